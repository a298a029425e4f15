//! The command line of Forebay.
//!
//! One file a command. A command writes its result to `out` and nothing else there; what goes wrong is told once, on
//! standard error, by `main`.

mod args;
mod bench;
mod checkpoint;
mod doctor;
mod inspect;
mod picture;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    // Usage errors end the process here, with code 2.
    let cli = Cli::parse();
    let mut out = io::stdout().lock();
    match execute(&cli.command, &mut out) {
        Ok(code) => code,
        // Whoever read the output has enough of it.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Without standard error there is nowhere to tell it.
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: &Command, out: &mut impl Write) -> anyhow::Result<ExitCode> {
    let code = match command {
        Command::Doctor(args) => doctor::doctor(args, out)?,
        Command::Inspect(args) => {
            inspect::inspect(args, out)?;
            ExitCode::SUCCESS
        }
        Command::Bench(args) => {
            bench::bench(args, out)?;
            ExitCode::SUCCESS
        }
    };
    out.flush()?;
    Ok(code)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>());
    io.is_some_and(|io| io.kind() == io::ErrorKind::BrokenPipe)
}
