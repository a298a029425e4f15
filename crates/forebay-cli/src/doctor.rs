//! `forebay doctor`

use std::io::Write;
use std::process::ExitCode;

use forebay::doctor::{Check, Status, examine, table};
use serde_json::{Value, json};

use crate::args::DoctorArgs;

pub(crate) fn doctor(args: &DoctorArgs, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let checks = examine();
    if args.json {
        let checks: Vec<_> = checks.iter().map(to_json).collect();
        writeln!(out, "{:#}", json!({ "checks": checks }))?;
    } else {
        write!(out, "{}", table(&checks))?;
    }
    Ok(if checks.iter().any(is_usable_device) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn is_usable_device(check: &Check) -> bool {
    (check.name == "host" || check.name.starts_with("cuda:")) && check.status != Status::Missing
}

fn to_json(check: &Check) -> Value {
    json!({
        "name": check.name,
        "status": check.status.to_string(),
        "detail": check.detail,
        "remedy": check.remedy,
    })
}
