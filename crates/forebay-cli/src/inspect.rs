//! `forebay inspect`

use std::collections::HashMap;
use std::io::{self, Write};

use forebay::Bytes;
use forebay::plan::{Plan, Residency};
use forebay::store::{Checkpoint, Dtype, TensorEntry};
use serde_json::{Value, json};

use crate::args::InspectArgs;
use crate::checkpoint::{Model, check_tables, quarter};
use crate::picture::{LEGEND, picture};

pub(crate) fn inspect(args: &InspectArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let models = [Model::open(&args.path, &args.layout)?];
    check_tables(&models, &args.layout)?;
    let budget = args.budget.unwrap_or_else(|| quarter(&models));
    let [Model { checkpoint, plan, .. }] = models;
    let report = Report {
        groups: groups(checkpoint.tensors()),
        residency: plan.within(budget),
        checkpoint,
        plan,
        budget,
    };
    if args.json {
        writeln!(out, "{:#}", report.to_json())?
    } else {
        report.print(out)?
    }
    Ok(())
}

struct Report {
    checkpoint: Checkpoint,
    groups: Vec<Group>,
    plan: Plan,
    budget: Bytes,
    residency: Residency,
}

/// Tensors that differ only in the numbers in their names.
struct Group {
    pattern: String,
    dtype: Dtype,
    shape: Vec<u64>,
    count: usize,
    bytes: Bytes,
}

impl Report {
    fn fits(&self) -> bool {
        self.budget >= self.plan.least_budget()
    }

    fn largest(&self) -> Option<&TensorEntry> {
        self.checkpoint.tensors().iter().max_by_key(|tensor| tensor.bytes)
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let Report { checkpoint, plan, .. } = self;
        let total = plan.weights();
        writeln!(
            out,
            "{}: {} of {total} in {}",
            checkpoint.path().display(),
            counted(checkpoint.tensors().len(), "tensor"),
            counted(checkpoint.files().len(), "file"),
        )?;
        if let Some(largest) = self.largest() {
            writeln!(out, "largest: {}, {}", largest.name, largest.bytes)?;
        }
        writeln!(
            out,
            "\n{:>6}  {:<12}  {:<20}  {:>10}  {:>6}  tensor",
            "count", "dtype", "shape", "bytes", "share"
        )?;
        for Group { pattern, dtype, shape, count, bytes } in &self.groups {
            let (shape, share) = (format!("{shape:?}"), percent(*bytes, total));
            let (dtype, bytes) = (dtype.name(), bytes.to_string());
            writeln!(out, "{count:>6}  {dtype:<12}  {shape:<20}  {bytes:>10}  {share:>6}  {pattern}")?;
        }
        self.print_layout(out)
    }

    fn print_layout(&self, out: &mut impl Write) -> io::Result<()> {
        let Report { plan, budget, residency, .. } = self;
        let (pages, size) = (plan.pages(), plan.page_size());
        write!(out, "\nlayout: {} of {size}", counted(pages as usize, "page"))?;
        if plan.small_pages() > 0 {
            write!(out, ", {} of them for small tensors and always resident", plan.small_pages())?;
        }
        writeln!(out, "\nneeds:  at least {}, all of it {}", plan.least_budget(), size * u64::from(pages))?;
        if !self.fits() {
            return writeln!(
                out,
                "budget: {budget} is too little by {}",
                plan.least_budget().saturating_sub(*budget)
            );
        }
        let Residency { resident, streamed, pages } = residency;
        writeln!(
            out,
            "budget: {budget} keeps {resident} resident and streams {streamed} a pass ({})",
            percent(*streamed, plan.weights())
        )?;
        writeln!(out, "\n{}\n{LEGEND}", picture(pages))
    }

    fn to_json(&self) -> Value {
        let Report { checkpoint, groups, plan, budget, residency } = self;
        let groups: Vec<_> = groups.iter().map(Group::to_json).collect();
        let files: Vec<_> = checkpoint.files().iter().map(|file| file.path().to_string_lossy()).collect();
        json!({
            "path": checkpoint.path().to_string_lossy(),
            "files": files,
            "tensors": checkpoint.tensors().len(),
            "bytes": plan.weights().get(),
            "largest": self.largest().map(|tensor| json!({ "name": tensor.name, "bytes": tensor.bytes.get() })),
            "groups": groups,
            "layout": {
                "page_size": plan.page_size().get(),
                "pages": plan.pages(),
                "small_pages": plan.small_pages(),
                "least_budget": plan.least_budget().get(),
            },
            "budget": {
                "bytes": budget.get(),
                "fits": self.fits(),
                "resident_bytes": residency.resident.get(),
                "streamed_bytes_a_pass": residency.streamed.get(),
                "picture": picture(&residency.pages),
            },
        })
    }
}

impl Group {
    fn to_json(&self) -> Value {
        json!({
            "tensors": self.pattern,
            "count": self.count,
            "dtype": self.dtype.name(),
            "shape": self.shape,
            "bytes": self.bytes.get(),
        })
    }
}

/// In the order of each group's first tensor.
fn groups(tensors: &[TensorEntry]) -> Vec<Group> {
    let mut places: HashMap<(String, Dtype, &[u64]), usize> = HashMap::new();
    let mut groups: Vec<Group> = Vec::new();
    for TensorEntry { name, dtype, shape, bytes, .. } in tensors {
        let pattern = pattern(name);
        let place = *places.entry((pattern.clone(), *dtype, shape)).or_insert(groups.len());
        match groups.get_mut(place) {
            Some(group) => {
                group.count += 1;
                group.bytes += *bytes;
            }
            None => {
                groups.push(Group { pattern, dtype: *dtype, shape: shape.clone(), count: 1, bytes: *bytes })
            }
        }
    }
    // A lone tensor has its own name.
    for group in groups.iter_mut().filter(|group| group.count == 1) {
        let of_group = |tensor: &&TensorEntry| {
            (tensor.dtype, &tensor.shape) == (group.dtype, &group.shape)
                && pattern(&tensor.name) == group.pattern
        };
        if let Some(tensor) = tensors.iter().find(of_group) {
            group.pattern = tensor.name.clone();
        }
    }
    groups
}

/// The name with `*` for every part that is a number: `layers.*.weight`.
fn pattern(name: &str) -> String {
    let part = |part: &str| match part {
        "" => String::new(),
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => "*".to_owned(),
        word => word.to_owned(),
    };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn percent(part: Bytes, whole: Bytes) -> String {
    let share = if whole == Bytes::ZERO { 0.0 } else { part.get() as f64 / whole.get() as f64 };
    format!("{:.1}%", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::pattern;

    #[test]
    fn numbers_between_dots_are_what_groups_differ_in() {
        assert_eq!(pattern("layers.12.mlp.weight"), "layers.*.mlp.weight");
        assert_eq!(pattern("conv1.weight"), "conv1.weight");
        assert_eq!(pattern("0..7"), "*..*");
        assert_eq!(pattern(""), "");
    }
}
