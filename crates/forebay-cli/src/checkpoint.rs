//! A checkpoint's tensors as weights.

use anyhow::ensure;
use forebay::plan::Plan;
use forebay::store::Checkpoint;
use forebay::{Bytes, LayoutOptions, WeightKind, WeightSpec};

use crate::args::ModelArgs;

/// Every tensor as a weight, in the order of the file.
pub(crate) fn weights(checkpoint: &Checkpoint, args: &ModelArgs) -> anyhow::Result<Vec<WeightSpec>> {
    for table in &args.tables {
        ensure!(checkpoint.get(table).is_some(), "{} has no tensor {table:?}", checkpoint.path().display());
    }
    let spec = |tensor: &forebay::store::TensorEntry| WeightSpec {
        name: tensor.name.clone(),
        source: tensor.source(),
        kind: if args.tables.contains(&tensor.name) { WeightKind::Table } else { WeightKind::Whole },
    };
    Ok(checkpoint.tensors().iter().map(spec).collect())
}

/// How the arguments want it laid out.
pub(crate) fn layout(args: &ModelArgs) -> LayoutOptions {
    LayoutOptions { page_size: args.page_size, ..LayoutOptions::default() }
}

/// The budget asked for; else a quarter of the model's pages, but no less than what works.
pub(crate) fn budget(args: &ModelArgs, plan: &Plan) -> Bytes {
    let quarter = plan.page_size() * u64::from(plan.pages() / 4);
    args.budget.unwrap_or_else(|| quarter.max(plan.least_budget()).max(plan.page_size()))
}
