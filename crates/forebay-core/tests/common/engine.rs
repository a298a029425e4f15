//! Uses models as an engine does: demand, read ahead, release.

use std::collections::VecDeque;

use forebay_core::{Bytes, Outcome, Schedule, VbarId, VbarSpec};

use super::world::World;
use super::{Checked, ensure, page_at};

/// A VBAR whose weights are its pages.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) id: VbarId,
    pub(crate) pages: u32,
    schedule: Schedule,
}

#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) world: World,
    /// Uses whose kernels have not finished.
    running: VecDeque<VbarId>,
    /// How many uses the GPU is behind.
    lag: usize,
}

/// What a pass cost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pass {
    /// Pages filled.
    pub(crate) fills: u32,
    /// How often the page filled most often was filled.
    pub(crate) most: u32,
    /// Uses that found their page absent.
    pub(crate) waits: u32,
}

impl Engine {
    pub(crate) fn new(budget: Bytes, lag: usize) -> Self {
        Engine { world: World::new(budget), running: VecDeque::new(), lag }
    }

    pub(crate) fn attach(&mut self, spec: VbarSpec) -> Model {
        let pages = spec.pages;
        Model { id: self.world.add(spec), pages, schedule: Schedule::new(pages) }
    }

    /// One pass over the pages in layout order.
    pub(crate) fn pass(&mut self, model: &mut Model) -> Checked<Pass> {
        self.pass_over(model, 0..model.pages)
    }

    /// One pass in the order given.
    pub(crate) fn pass_over(
        &mut self,
        model: &mut Model,
        order: impl IntoIterator<Item = u32>,
    ) -> Checked<Pass> {
        let before = self.world.ledger.history().len();
        let mut waits = 0;
        for page in order {
            waits += u32::from(!self.world.books.page(page_at(model.id, page)).backed);
            self.use_page(model, page)?;
        }
        let mut times = vec![0; model.pages as usize];
        for page in &self.world.ledger.history()[before..] {
            if page.vbar == model.id {
                times[page.page.as_usize()] += 1;
            }
        }
        Ok(Pass { fills: times.iter().sum(), most: times.into_iter().max().unwrap_or(0), waits })
    }

    /// One pass of each model. How many pages were filled.
    pub(crate) fn round(&mut self, models: &mut [Model]) -> Checked<u32> {
        models.iter_mut().map(|model| Ok(self.pass(model)?.fills)).sum()
    }

    fn use_page(&mut self, model: &mut Model, page: u32) -> Checked {
        let at = page_at(model.id, page);
        self.world.touch(model.id, 0)?;
        let mut outcome = self.world.demand(&[at], Bytes::ZERO)?;
        while outcome == Outcome::Blocked && !self.running.is_empty() {
            self.finish_one()?;
            outcome = self.world.demand(&[at], Bytes::ZERO)?;
        }
        ensure!(outcome == Outcome::Granted, "{at} of {}: {outcome:?}", self.world.budget);
        self.running.push_back(model.id);
        self.world.touch(model.id, 1)?;
        let mut gone = Vec::new();
        if model.schedule.used(page, |dropped| gone.push(dropped)) {
            gone.push(page);
        }
        for page in gone {
            self.world.unplan(page_at(model.id, page))?;
        }
        self.read_ahead(model)?;
        while self.running.len() > self.lag {
            self.finish_one()?;
        }
        self.read_ahead(model)
    }

    fn finish_one(&mut self) -> Checked {
        self.running.pop_front();
        self.world.release(0)
    }

    fn read_ahead(&mut self, model: &mut Model) -> Checked {
        let lost = self.world.policy.lost_plans(model.id);
        while lost && let Some(page) = model.schedule.unplan_last() {
            self.world.unplan(page_at(model.id, page))?;
        }
        while let Some(page) = model.schedule.plan_next() {
            if !self.world.plan(page_at(model.id, page))? {
                model.schedule.unplan_last();
                break;
            }
        }
        self.world.settle()
    }
}
