//! A plan tells what the engine then does.

mod common;

use common::{Consumer, Random, Weights, device, engine_on};
use forebay::plan::Plan;
use forebay::{Bytes, EngineError, LayoutOptions, PageState, Use};

const MIB: usize = 1 << 20;

fn options() -> LayoutOptions {
    LayoutOptions { page_size: Some(Bytes::mib(2)), ..LayoutOptions::default() }
}

#[test]
fn what_is_planned_is_resident_after_a_few_passes() {
    let weights = Weights::new(&mut Random::seeded(), &[3 * MIB; 40]);
    let plan = Plan::new(weights.specs.clone(), options()).unwrap();
    let device = device();
    for pages in [8, 20, 60] {
        let budget = Bytes::mib(2) * pages;
        let engine = engine_on(device.clone(), budget);
        let model = weights.attach(&engine, "model");
        let mut consumer = Consumer::new(&device);
        let mut before = Bytes::ZERO;
        for _pass in 0..4 {
            before = model.stats().filled;
            (0..40).for_each(|weight| consumer.use_weight(&model, &weights, weight).unwrap());
            engine.settle().unwrap();
        }
        let (planned, found) = (plan.within(budget), model.stats());
        let resident =
            |pages: &[PageState]| pages.iter().filter(|page| **page == PageState::Resident).count();
        let (kept, kept_planned) = (resident(&found.pages), resident(&planned.pages));
        assert!(
            kept.abs_diff(kept_planned) <= 2,
            "budget {budget}: {kept_planned} pages planned, {kept} kept"
        );
        // Read-ahead does not end with the pass: up to a window more or less.
        let copied = found.filled - before;
        let off = planned.streamed.get().abs_diff(copied.get());
        assert!(
            off <= 18 * Bytes::mib(2).get(),
            "budget {budget}: {} planned, {copied} copied",
            planned.streamed
        );
    }
}

#[test]
fn the_least_budget_is_enough_and_less_is_not() {
    let weights = Weights::new(&mut Random::seeded(), &[100, 3 * MIB, 5 * MIB, MIB]);
    let least = Plan::new(weights.specs.clone(), options()).unwrap().least_budget();
    for (budget, fits) in [(least, true), (least - Bytes::mib(2), false)] {
        let engine = common::engine(budget);
        let model = weights.attach(&engine, "model");
        let mut results = (0..4).map(|i| model.acquire(i, Use::on(forebay::device::StreamHandle::DEFAULT)));
        let too_large = results.any(|result| matches!(result, Err(EngineError::TooLarge { .. })));
        assert_eq!(!too_large, fits, "budget {budget}");
    }
}
