//! Models used pass after pass: how many pages each pass fills, and how residency follows the budget.
//!
//! A pass over `n` pages in `b` frames fills at least `n (n - b) / (n - 1)` pages in the long run, with perfect
//! foresight and no read-ahead (L. Belady's MIN on a cyclic scan). Of the frames, `window` are for reading ahead, so the
//! policy keeps `b - window` pages and fills the others: `n - b + window`, each of them once.

mod common;

use common::engine::{Engine, Model, Pass};
use common::{Checked, UNIT, ensure, page_at, streamed};
use forebay_core::PageState;
use proptest::prelude::*;

/// The most pages that a steady pass may fill.
fn bound(n: u32, frames: u32, window: u32) -> u32 {
    if frames >= n { 0 } else { (n - frames + window).min(n) }
}

fn resident(engine: &Engine, model: &Model) -> Vec<u32> {
    (0..model.pages)
        .filter(|&page| engine.world.policy.state(page_at(model.id, page)) == PageState::Resident)
        .collect()
}

fn set_frames(engine: &mut Engine, frames: u32) -> Checked {
    engine.world.set_budget(UNIT * u64::from(frames))
}

fn engine(frames: u32, lag: usize) -> Engine {
    Engine::new(UNIT * u64::from(frames), lag)
}

/// An engine after `passes` passes.
fn warm(n: u32, frames: u32, window: u32, lag: usize, passes: usize) -> Checked<(Engine, Model)> {
    let mut engine = engine(frames, lag);
    let mut model = engine.attach(streamed(n, window));
    for _ in 0..passes {
        engine.pass(&mut model)?;
    }
    Ok((engine, model))
}

fn check_steady(n: u32, frames: u32, window: u32, lag: usize) -> Checked {
    let (mut engine, mut model) = warm(n, frames, window, lag, 0)?;
    let foreseen = engine.world.policy.settled_watermark(model.id).0;
    for _ in 0..2 {
        engine.pass(&mut model)?;
    }
    let watermark = engine.world.policy.watermark(model.id);
    for _ in 0..3 {
        let Pass { fills, most, waits } = engine.pass(&mut model)?;
        ensure!(fills <= bound(n, frames, window), "{fills} fills, {} expected", bound(n, frames, window));
        ensure!(most <= 1, "a page was filled {most} times in one pass");
        ensure!(waits == 0 || frames as usize <= lag, "{waits} uses came before their page");
    }
    ensure!(engine.world.policy.watermark(model.id) == watermark, "the watermark moves without a reason");
    let kept = resident(&engine, &model);
    let expected = if frames >= n { n } else { frames.saturating_sub(window) };
    ensure!(kept.len() as u32 >= expected, "{} of {expected} pages are kept", kept.len());
    let settled = engine.world.policy.settled_watermark(model.id).0;
    ensure!(
        (foreseen, settled) == (expected, expected),
        "{foreseen} and {settled} pages foreseen, not {expected}"
    );
    let around = kept.iter().chain(kept.first()).copied().collect::<Vec<_>>();
    let widest = around.windows(2).map(|pair| (pair[1] + n - pair[0] - 1) % n + 1).max().unwrap_or(0);
    ensure!(widest <= (4 * n / expected.max(1)).max(1), "{widest} pages between two kept ones of {kept:?}");
    Ok(())
}

#[test]
fn a_steady_pass_fills_each_page_that_does_not_fit_once_and_those_of_the_window() {
    for n in [1, 2, 7, 24, 65] {
        for (window, lag) in [(2, 0), (3, 1), (4, 0), (4, 2), (8, 1)] {
            for frames in 1..=n + 1 {
                check_steady(n, frames, window, lag).unwrap_or_else(|wrong| {
                    panic!("{n} pages, {frames} frames, window {window}, lag {lag}: {wrong}")
                });
            }
        }
    }
}

#[test]
fn the_first_pass_reads_each_page_once_and_begins_the_next() {
    for frames in 4..=24 {
        let mut engine = engine(frames, 1);
        let mut model = engine.attach(streamed(24, 4));
        let first = engine.pass(&mut model).unwrap();
        assert!(first.fills <= 24 + 4, "{frames} frames: {first:?}");
    }
}

#[test]
fn a_first_pass_in_another_order_within_blocks_reads_each_page_once() {
    // As the model has them: a, b, modulation, nine pages a block; as it uses them: modulation, a, b.
    let order = (0..8).flat_map(|block| [6, 7, 8, 0, 1, 2, 3, 4, 5].map(|page| 9 * block + page));
    for frames in [20, 24, 36, 60] {
        let mut engine = engine(frames, 1);
        let mut model = engine.attach(streamed(72, 12));
        let first = engine.pass_over(&mut model, order.clone()).unwrap();
        assert!(first.fills <= 72 + 12, "{frames} frames: {first:?}");
    }
}

fn check_spike(n: u32, frames: u32, low: u32) -> Checked {
    const WINDOW: u32 = 4;
    let (mut engine, mut model) = warm(n, frames, WINDOW, 1, 3)?;
    let before = resident(&engine, &model).len() as u32;
    set_frames(&mut engine, low)?;
    engine.pass(&mut model)?;
    for _ in 0..3 {
        let Pass { fills, most, .. } = engine.pass(&mut model)?;
        ensure!(fills <= bound(n, low, WINDOW), "{fills} fills a pass in the spike");
        ensure!(most <= 1, "a page was filled {most} times in one pass of the spike");
    }
    set_frames(&mut engine, frames)?;
    // Calm is counted in streamed uses; then each of them may raise the watermark.
    let streamed_uses = 64 + frames - low;
    let passes = 3 + streamed_uses.div_ceil((n - frames + WINDOW).min(n - low + WINDOW));
    for _ in 0..passes {
        engine.pass(&mut model)?;
    }
    let after = resident(&engine, &model).len() as u32;
    ensure!(after + 1 >= before, "{after} of {before} pages are kept {passes} passes after the spike");
    let watermark = engine.world.policy.watermark(model.id);
    for _ in 0..20 {
        let Pass { fills, most, .. } = engine.pass(&mut model)?;
        ensure!(fills <= bound(n, frames, WINDOW) && most <= 1, "{fills} fills a pass after the spike");
        let now = engine.world.policy.watermark(model.id);
        ensure!(now == watermark, "the watermark goes on moving from {watermark:?} to {now:?}");
    }
    Ok(())
}

#[test]
fn residency_comes_back_after_a_spike_and_stays() {
    let spikes =
        [(24, 16, 8), (24, 16, 15), (24, 20, 4), (24, 24, 10), (24, 23, 22), (200, 100, 80), (200, 190, 100)];
    for (n, frames, low) in spikes {
        check_spike(n, frames, low)
            .unwrap_or_else(|wrong| panic!("{n} pages, {frames} frames, {low} in the spike: {wrong}"));
    }
}

#[test]
fn memory_that_comes_free_in_small_steps_is_used_too() {
    let (mut engine, mut model) = warm(100, 40, 4, 1, 3).unwrap();
    for frames in (41..=100).step_by(3) {
        set_frames(&mut engine, frames).unwrap();
        engine.pass(&mut model).unwrap();
    }
    let fills: Vec<_> = (0..6).map(|_| engine.pass(&mut model).unwrap().fills).collect();
    assert!(fills[5] <= bound(100, 98, 4), "{fills:?}");
}

#[test]
fn two_models_that_fit_together_are_never_read_again() {
    let mut engine = engine(40, 1);
    let (mut encoder, mut denoiser) = (engine.attach(streamed(16, 4)), engine.attach(streamed(24, 4)));
    for turn in 0..4 {
        for model in [&mut encoder, &mut denoiser] {
            let pass = engine.pass(model).unwrap();
            assert_eq!(pass.fills, if turn == 0 { model.pages } else { 0 });
        }
    }
}

#[test]
fn of_two_models_in_turn_the_one_in_use_gets_the_memory() {
    let mut engine = engine(30, 1);
    let (mut encoder, mut denoiser) = (engine.attach(streamed(16, 4)), engine.attach(streamed(24, 4)));
    for _ in 0..4 {
        for model in [&mut encoder, &mut denoiser] {
            let passes: Vec<_> = (0..3).map(|_| engine.pass(model).unwrap()).collect();
            assert!(passes.iter().all(|pass| pass.most <= 1), "{passes:?}");
            assert_eq!(passes[2].fills, 0, "it fits as long as it is the one in use");
            assert_eq!(resident(&engine, model).len() as u32, model.pages);
        }
        let left = resident(&engine, &encoder).len();
        assert!((30 - 24 - 1..=30 - 24).contains(&left), "{left} pages of the other model are kept");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Skipped layers, other orders, experts: every use is granted, and order that returns is learned again.
    #[test]
    fn any_order_is_served(
        n in 2u32..40,
        window in 3u32..6,
        share in 0.05f64..1.0,
        passes in prop::collection::vec(order(), 1..8),
    ) {
        let frames = ((f64::from(n) * share) as u32).max(2);
        let check = || -> Checked {
            let (mut engine, mut model) = warm(n, frames, window, 1, 2)?;
            for order in &passes {
                engine.pass_over(&mut model, order.over(n))?;
            }
            for _ in 0..3 {
                engine.pass(&mut model)?;
            }
            let Pass { fills, most, .. } = engine.pass(&mut model)?;
            ensure!(fills <= bound(n, frames, window), "{fills} fills, {} expected", bound(n, frames, window));
            ensure!(most <= 1, "a page was filled {most} times in one pass");
            Ok(())
        };
        check().map_err(|wrong| TestCaseError::fail(format!("{frames} frames: {wrong}")))?;
    }
}

#[derive(Clone, Debug)]
enum Order {
    Forwards,
    Backwards,
    Without { skipped: Vec<u32> },
    Any { pages: Vec<u32> },
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![
        Just(Order::Forwards),
        Just(Order::Backwards),
        prop::collection::vec(0u32..40, 1..8).prop_map(|skipped| Order::Without { skipped }),
        prop::collection::vec(0u32..40, 1..60).prop_map(|pages| Order::Any { pages }),
    ]
}

impl Order {
    fn over(&self, n: u32) -> Vec<u32> {
        match self {
            Order::Forwards => (0..n).collect(),
            Order::Backwards => (0..n).rev().collect(),
            Order::Without { skipped } => (0..n).filter(|page| !skipped.contains(page)).collect(),
            Order::Any { pages } => pages.iter().map(|page| page % n).collect(),
        }
    }
}
