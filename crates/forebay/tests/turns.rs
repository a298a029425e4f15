//! Models used in turn within one step stream what is missing once a round, not once for each of them.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::sync::Arc;

use common::{Consumer, Random, Rig, Weights, assert_no_pins};
use forebay::{Attachment, Budget, Bytes, Engine};

const MIB: usize = 1 << 20;
const PAGE: Bytes = Bytes::mib(2);
/// Pages of the window in the smaller of the budgets below, a quarter of it.
const WINDOW: u64 = 4;

/// Models of pages of one weight each, with windows of a small budget, in a larger one.
fn attached(rig: &Rig, sizes: &[usize], frames: u64) -> (Arc<Engine>, Vec<(Attachment, Weights)>) {
    let mut random = Random::seeded();
    let engine = rig.engine(PAGE * (4 * WINDOW));
    let models = sizes.iter().enumerate().map(|(number, &pages)| {
        let weights = Weights::in_a_file(&mut random, &vec![2 * MIB; pages]);
        (weights.attach(&engine, &format!("model {number}")), weights)
    });
    let models = models.collect();
    engine.set_budget(Budget::Fixed(PAGE * frames)).unwrap();
    (engine, models)
}

fn passes(consumer: &mut Consumer, (model, weights): &(Attachment, Weights), passes: usize) {
    for weight in (0..passes).flat_map(|_| 0..weights.contents.len()) {
        consumer.use_weight(model, weights, weight).unwrap();
    }
}

/// Pages filled in a round, on average over some.
fn filled(engine: &Engine, models: &[(Attachment, Weights)], rounds: u64, mut round: impl FnMut()) -> u64 {
    let filled = || models.iter().map(|(model, _)| model.stats().filled_pages).sum::<u64>();
    engine.settle().unwrap();
    let before = filled();
    (0..rounds).for_each(|_| round());
    engine.settle().unwrap();
    (filled() - before).div_ceil(rounds)
}

#[test]
fn two_models_in_turn_stream_what_does_not_fit() {
    let rig = Rig::new();
    let (engine, models) = attached(&rig, &[24, 24], 30);
    let mut consumer = rig.consumer();
    let mut round = || models.iter().for_each(|model| passes(&mut consumer, model, 1));
    (0..6).for_each(|_| round());
    let fills = filled(&engine, &models, 6, round);
    let bound = (24 + 24 - 30 + 2 * WINDOW) * 6 / 5;
    assert!(fills <= bound, "{fills} pages a round, not {bound}: {}", engine.stats());
    consumer.check();
    assert_no_pins(&engine, 0);
}

#[test]
fn a_model_that_drafts_for_a_larger_one_stays() {
    let rig = Rig::new();
    let (engine, models) = attached(&rig, &[12, 40], 30);
    let mut consumer = rig.consumer();
    let mut round = || (0..2).for_each(|model| passes(&mut consumer, &models[model], [4, 1][model]));
    (0..6).for_each(|_| round());
    let fills = filled(&engine, &models, 6, round);
    let bound = (12 + 40 - 30 + WINDOW) * 6 / 5;
    assert!(fills <= bound, "{fills} pages a round, not {bound}: {}", engine.stats());
    consumer.check();
    assert_no_pins(&engine, 0);
}
