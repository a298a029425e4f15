//! A VBAR that is being removed gives everything up.

mod common;

use common::world::World;
use common::{UNIT, page_at, streamed};
use forebay_core::{Bytes, Command, Mode, Outcome, PageRef, Pins, Policy, Rank, VbarId, VbarSpec};

#[test]
fn a_page_that_was_planned_leaves_with_its_last_pin() {
    let mut world = World::new(UNIT * 4);
    let id = world.add(streamed(8, 2));
    let page = page_at(id, 0);
    world.plan(page).unwrap();
    world.demand(&[page], Bytes::ZERO).unwrap();
    world.close(id).unwrap();
    world.settle().unwrap();
    assert_eq!(world.policy.held_pages(id), 1);
    world.release(0).unwrap();
    assert_eq!(world.policy.held_pages(id), 0);
}

#[test]
fn nothing_new_comes_in() {
    let mut world = World::new(UNIT * 4);
    let id = world.add(streamed(8, 2));
    world.close(id).unwrap();
    assert_eq!(world.plan(page_at(id, 0)), Ok(false));
    assert_eq!(world.demand(&[page_at(id, 0)], Bytes::ZERO), Ok(Outcome::Refused));
    assert_eq!(world.forget(id), Ok(true));
}

/// A caller on another thread, who lets go right after he was seen.
#[derive(Default)]
struct LetsGo {
    pinned: bool,
    /// He saw that releases are to be told.
    tells: bool,
}

impl Pins for LetsGo {
    fn pin(&mut self, _: PageRef) {}

    fn unpin(&mut self, _: PageRef) {}

    fn claim(&mut self, _: PageRef) -> bool {
        !std::mem::take(&mut self.pinned)
    }

    fn set_streamed(&mut self, _: PageRef) -> bool {
        self.tells |= self.pinned;
        std::mem::take(&mut self.pinned)
    }

    fn set_stale(&mut self, _: PageRef) {}

    fn set_resident(&mut self, _: PageRef) {}
}

/// How many pages stay after an event that meets such a caller on the only one.
fn left_after(mode: Mode, event: impl FnOnce(&mut Policy, VbarId, &mut LetsGo, &mut Vec<Command>)) -> u32 {
    let mut policy = Policy::new(UNIT * 4);
    let id = policy.add_vbar(VbarSpec { mode, ..streamed(8, 2) });
    let (page, mut pins, mut out) = (page_at(id, 0), LetsGo::default(), Vec::new());
    assert_eq!(policy.demand(&[page], Bytes::ZERO, &mut pins, &mut out), Outcome::Granted);
    policy.filled(page, &mut pins, &mut out);
    pins = LetsGo { pinned: true, tells: false };
    event(&mut policy, id, &mut pins, &mut out);
    if pins.tells {
        policy.released(page, &mut pins, &mut out);
    }
    policy.held_pages(id)
}

#[test]
fn a_pin_that_goes_at_the_wrong_moment_keeps_nothing() {
    let left = left_after(Mode::Streamed, |policy, id, pins, out| policy.close_vbar(id, pins, out));
    assert_eq!(left, 0, "closing");
    let left = left_after(Mode::Explicit, |policy, id, pins, out| {
        policy.lower_watermark(id, Rank(0), pins, out);
    });
    assert_eq!(left, 0, "above an explicit watermark");
}
