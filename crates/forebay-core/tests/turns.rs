//! Models used in turn within one step: they do not take each other's memory at each turn.
//!
//! In a round of one pass each they lack `total - frames` pages, and stream through a window each. If each took what it
//! lacks from the next, that would be `total - frames` for each of them.

mod common;

use common::books::Books;
use common::engine::{Engine, Model};
use common::{Checked, UNIT, ensure, explicit, streamed};
use forebay_core::{Bytes, Policy, Rank, VbarId, VbarSpec};

const SETTLED: usize = 8;
const WINDOW: u32 = 4;

struct Rig {
    engine: Engine,
    models: Vec<Model>,
    lag: u32,
}

impl Rig {
    fn new(sizes: &[u32], frames: u32, lag: u32) -> Self {
        Self::of(sizes.iter().map(|&pages| streamed(pages, WINDOW)), frames, lag)
    }

    fn of(specs: impl IntoIterator<Item = VbarSpec>, frames: u32, lag: u32) -> Self {
        let mut engine = Engine::new(UNIT * u64::from(frames), lag as usize);
        let models = specs.into_iter().map(|spec| engine.attach(spec)).collect();
        Rig { engine, models, lag }
    }

    /// Pages filled in each of some rounds of one pass each.
    fn rounds(&mut self, rounds: usize) -> Checked<Vec<u32>> {
        (0..rounds).map(|_| self.engine.round(&mut self.models)).collect()
    }

    /// Pages filled in some passes of one model.
    fn passes(&mut self, model: usize, passes: usize) -> Checked<Vec<u32>> {
        let model = &mut self.models[model];
        (0..passes).map(|_| Ok(self.engine.pass(model)?.fills)).collect()
    }

    fn set_frames(&mut self, frames: u32) -> Checked {
        self.engine.world.set_budget(UNIT * u64::from(frames))
    }

    fn watermark(&self, model: usize) -> u32 {
        self.engine.world.policy.watermark(self.models[model].id).0
    }

    fn shares(&self) -> Vec<f64> {
        let share = |model: usize| f64::from(self.watermark(model)) / f64::from(self.models[model].pages);
        (0..self.models.len()).map(share).collect()
    }

    /// Whether all keep about the same share, but for those that have the rest of their pages in their windows.
    fn is_even(&self) -> bool {
        let beside_window = |&model: &usize| self.watermark(model) + WINDOW < self.models[model].pages;
        let shares: Vec<_> =
            (0..self.models.len()).filter(beside_window).map(|model| self.shares()[model]).collect();
        shares.iter().all(|share| (share - shares[0]).abs() < 0.1 + 1e-9)
    }

    fn missing(&self, frames: u32) -> u32 {
        self.models.iter().map(|model| model.pages).sum::<u32>().saturating_sub(frames)
    }

    fn windows(&self) -> u32 {
        self.models.iter().map(|model| WINDOW.min(model.pages)).sum()
    }

    /// Whether sharing fills less than taking does.
    fn shares_in(&self, frames: u32) -> bool {
        let others = self.models.len() as u32 - 1;
        self.missing(frames) * others >= self.windows()
    }

    /// The most pages that a settled round may fill. Pages in use are not in the window.
    fn bound(&self, frames: u32) -> u32 {
        match self.missing(frames) {
            0 => 0,
            missing => (missing + self.windows() + self.lag * self.models.len() as u32) * 11 / 10,
        }
    }

    fn check_settled(&mut self, frames: u32, rounds: usize) -> Checked {
        let bound = self.bound(frames);
        for _ in 0..rounds {
            let fills = self.rounds(1)?[0];
            ensure!(fills <= bound, "{fills} fills a round, {bound} at most expected: {:?}", self.shares());
            let uneven = self.shares_in(frames) && !self.is_even();
            ensure!(!uneven, "uneven shares: {:?}", self.shares());
        }
        Ok(())
    }
}

#[test]
fn what_is_missing_is_streamed_once_a_round_and_shares_are_even() {
    let sets: [&[u32]; 6] = [&[24, 24], &[12, 40], &[40, 12], &[24, 24, 24], &[40, 10, 24], &[50, 30]];
    for sizes in sets {
        let total: u32 = sizes.iter().sum();
        for lag in [0, 1] {
            for frames in (total / 3..=total).step_by(total as usize / 7) {
                let mut rig = Rig::new(sizes, frames, lag);
                let check = rig
                    .rounds(SETTLED)
                    .and_then(|_| rig.check_settled(frames, if sizes[0] == 24 { 50 } else { 8 }));
                check.unwrap_or_else(|wrong| panic!("{sizes:?} pages, {frames} frames, lag {lag}: {wrong}"));
            }
        }
    }
}

#[test]
fn lasting_priorities_follow_a_model_that_goes_on_alone_but_not_turns() {
    let mut rig = Rig::new(&[24, 24], 30, 1);
    rig.passes(0, 10).unwrap();
    let lasting = |rig: &Rig| {
        let policy = &rig.engine.world.policy;
        let lasting = policy.lasting_priorities();
        assert_eq!(policy.lasting_first(), lasting.first().copied());
        lasting
    };
    let ids: Vec<VbarId> = rig.models.iter().map(|model| model.id).collect();
    assert_eq!(lasting(&rig), ids);
    rig.passes(1, 10).unwrap();
    assert_eq!(lasting(&rig), [ids[1], ids[0]]);
    rig.rounds(SETTLED).unwrap();
    let settled = lasting(&rig);
    for model in [0, 1, 0, 1] {
        rig.passes(model, 1).unwrap();
        assert_eq!(lasting(&rig), settled);
    }
}

#[test]
fn pages_of_other_sizes_count_by_their_bytes() {
    let large = VbarSpec { page_size: UNIT * 2, ..streamed(12, WINDOW) };
    let mut rig = Rig::of([streamed(24, WINDOW), large], 28, 1);
    rig.rounds(SETTLED).unwrap();
    for _ in 0..20 {
        rig.rounds(1).unwrap();
        assert!(rig.is_even(), "{:?}", rig.shares());
    }
}

#[test]
fn one_that_goes_on_alone_takes_all_it_can_until_they_are_used_in_turn_again() {
    let mut rig = Rig::new(&[24, 24], 30, 1);
    rig.rounds(SETTLED).unwrap();
    rig.check_settled(30, 5).unwrap();
    let fills = rig.passes(0, 10).unwrap();
    assert!(fills[4..].iter().all(|&fills| fills == 0), "{fills:?}");
    assert_eq!(rig.watermark(0), 24);
    rig.rounds(SETTLED).unwrap();
    rig.check_settled(30, 20).unwrap();
}

#[test]
fn a_third_one_takes_memory_and_is_forgotten() {
    let mut rig = Rig::new(&[24, 24], 36, 1);
    rig.rounds(SETTLED).unwrap();
    let mut third = rig.engine.attach(streamed(20, WINDOW));
    let fills: Vec<_> = (0..6).map(|_| rig.engine.pass(&mut third).unwrap().fills).collect();
    assert_eq!((fills[0], fills[5]), (20, 0), "{fills:?}");
    rig.rounds(SETTLED).unwrap();
    rig.check_settled(36, 20).unwrap();
    assert_eq!(rig.engine.world.policy.held_pages(third.id), 0);
}

#[test]
fn one_of_three_that_is_used_no_more_leaves_its_share_to_the_others() {
    let mut rig = Rig::new(&[24, 24, 24], 44, 1);
    rig.rounds(SETTLED).unwrap();
    rig.check_settled(44, 5).unwrap();
    let gone = rig.models.pop().unwrap();
    rig.rounds(SETTLED).unwrap();
    rig.check_settled(44, 20).unwrap();
    assert_eq!(rig.engine.world.policy.held_pages(gone.id), 0);
}

#[test]
fn one_that_is_closed_leaves_its_share_to_the_others() {
    let mut rig = Rig::new(&[24, 24, 24], 44, 0);
    rig.rounds(SETTLED).unwrap();
    let gone = rig.models.remove(1);
    rig.engine.world.close(gone.id).unwrap();
    rig.engine.world.rest().unwrap();
    assert_eq!(rig.engine.world.forget(gone.id), Ok(true));
    rig.rounds(SETTLED).unwrap();
    rig.check_settled(44, 20).unwrap();
}

#[test]
fn shares_follow_the_budget() {
    let mut rig = Rig::new(&[24, 40], 30, 1);
    rig.rounds(SETTLED).unwrap();
    for frames in [44, 24, 36, 64, 30, 52, 22] {
        rig.set_frames(frames).unwrap();
        // A watermark rises after 64 uses of streamed pages.
        rig.rounds(SETTLED).unwrap();
        rig.check_settled(frames, 20).unwrap_or_else(|wrong| panic!("{frames} frames: {wrong}"));
    }
}

#[test]
fn a_small_one_of_several_passes_keeps_its_memory_from_a_large_one_of_one_pass() {
    for frames in [20, 30, 40, 50] {
        let mut rig = Rig::new(&[12, 40], frames, 1);
        for round in 0..30 {
            let fills = [rig.passes(0, 4).unwrap(), rig.passes(1, 1).unwrap()].concat();
            let bound = (12 + 40 - frames + WINDOW + 1) * 11 / 10;
            let sum: u32 = fills.iter().sum();
            assert!(round < SETTLED || sum <= bound, "{frames} frames, {bound} expected: {fills:?}");
        }
        assert_eq!(rig.watermark(0), 12);
    }
}

/// Pages filled in each pass of a text encoder, a denoiser and a decoder, picture after picture.
fn pipeline(frames: u32, uses_a_pass: impl Fn(u32) -> u32) -> Checked<Vec<Vec<u32>>> {
    let spec = |pages| VbarSpec { uses_a_pass: uses_a_pass(pages), ..streamed(pages, WINDOW) };
    let mut rig = Rig::of([16, 40, 8].map(spec), frames, 1);
    [(0, 1), (1, 20), (2, 1)].repeat(5).into_iter().map(|(model, passes)| rig.passes(model, passes)).collect()
}

#[test]
fn a_pipeline_is_as_if_nobody_counted_passes() {
    for frames in [20, 30, 44, 56] {
        let counted = pipeline(frames, |pages| pages).unwrap();
        assert_eq!(Ok(counted), pipeline(frames, |_| 0), "{frames} frames");
    }
}

/// Two VBARs are touched in turn, a pass each. The watermark of the second after its last turn, and its pages.
fn last_turn(specs: [VbarSpec; 2], prioritized: bool) -> (u32, u32) {
    let mut policy = Policy::new(Bytes::ZERO);
    let pages = specs.each_ref().map(|spec| spec.pages);
    let ids = specs.map(|spec| policy.add_vbar(spec));
    let turn = |policy: &mut Policy, id: VbarId| policy.touch(id, pages[0]);
    for _ in 0..4 {
        ids.into_iter().for_each(|id| turn(&mut policy, id));
    }
    if prioritized {
        policy.prioritize(ids[0]);
    }
    turn(&mut policy, ids[0]);
    policy.lower_watermark(ids[1], Rank(2), &mut Books::new(Bytes::ZERO), &mut vec![]);
    turn(&mut policy, ids[1]);
    (policy.watermark(ids[1]).0, pages[1])
}

#[test]
fn explicit_and_prioritized_ones_are_not_used_in_turn() {
    let spec = || streamed(24, WINDOW);
    let (watermark, pages) = last_turn([spec(), spec()], false);
    assert!(watermark < pages, "the common level");
    for (specs, prioritized) in
        [([spec(), spec()], true), ([spec(), explicit(24)], false), ([explicit(24), spec()], false)]
    {
        let (watermark, pages) = last_turn(specs, prioritized);
        assert_eq!(watermark, pages, "fully open");
    }
}
