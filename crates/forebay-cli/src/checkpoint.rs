//! Checkpoints as models: their tensors as weights, laid out.

use std::path::Path;

use anyhow::ensure;
use forebay::plan::Plan;
use forebay::store::{Checkpoint, TensorEntry};
use forebay::{Bytes, LayoutOptions, WeightKind, WeightSpec};

use crate::args::LayoutArgs;

/// A checkpoint that was opened, and how it is laid out.
pub(crate) struct Model {
    pub(crate) checkpoint: Checkpoint,
    /// Every tensor, in the order of the file.
    pub(crate) weights: Vec<WeightSpec>,
    pub(crate) options: LayoutOptions,
    pub(crate) plan: Plan,
}

impl Model {
    pub(crate) fn open(path: &Path, args: &LayoutArgs) -> anyhow::Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let spec = |tensor: &TensorEntry| WeightSpec {
            name: tensor.name.clone(),
            source: tensor.source(),
            kind: if args.tables.contains(&tensor.name) { WeightKind::Table } else { WeightKind::Whole },
        };
        let weights: Vec<_> = checkpoint.tensors().iter().map(spec).collect();
        let options = LayoutOptions { page_size: args.page_size, ..LayoutOptions::default() };
        let plan = Plan::new(weights.clone(), options)?;
        Ok(Model { checkpoint, weights, options, plan })
    }

    /// The path that was opened: a folder's index or file.
    pub(crate) fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    /// All of its pages.
    pub(crate) fn pages(&self) -> Bytes {
        self.plan.page_size() * u64::from(self.plan.pages())
    }

    /// The pages that never leave.
    fn small(&self) -> Bytes {
        self.plan.page_size() * u64::from(self.plan.small_pages())
    }
}

/// Whether every table asked for is in one of the models.
pub(crate) fn check_tables(models: &[Model], args: &LayoutArgs) -> anyhow::Result<()> {
    for table in &args.tables {
        let found = models.iter().any(|model| model.checkpoint.get(table).is_some());
        let named: Vec<_> = models.iter().map(|model| model.path().display().to_string()).collect();
        let has = if named.len() == 1 { "has" } else { "have" };
        ensure!(found, "{} {has} no tensor {table:?}", named.join(", "));
    }
    Ok(())
}

/// The least memory that works for models that are used in turn, one weight at a time.
pub(crate) fn least_budget(models: &[Model]) -> Bytes {
    let small: Bytes = models.iter().map(Model::small).sum();
    let widest = models.iter().map(|model| model.plan.least_budget() - model.small()).max();
    small + widest.unwrap_or(Bytes::ZERO)
}

/// A quarter of the models' pages, but no less than what works.
pub(crate) fn quarter(models: &[Model]) -> Bytes {
    let quarter = models.iter().map(|model| model.plan.page_size() * u64::from(model.plan.pages() / 4)).sum();
    let page = models.iter().map(|model| model.plan.page_size()).max().unwrap_or(Bytes::ZERO);
    least_budget(models).max(page).max(quarter)
}
