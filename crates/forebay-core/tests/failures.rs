//! Frames that cannot be made and pages that cannot be filled.

mod common;

use common::world::World;
use common::{UNIT, page_at, streamed};
use forebay_core::{Bytes, Outcome};

#[test]
fn a_frame_whose_fill_failed_goes_when_it_is_over_the_budget() {
    let mut world = World::new(UNIT * 3);
    let id = world.add(streamed(8, 2));
    world.demand(&[page_at(id, 0)], Bytes::ZERO).unwrap();
    world.execute(usize::MAX).unwrap();
    world.set_budget(Bytes::ZERO).unwrap();
    assert_eq!(world.policy.held(), UNIT, "it is being filled");
    world.fail_fill(0).unwrap();
    assert_eq!(world.policy.held(), Bytes::ZERO);
}

#[test]
fn a_refused_frame_lowers_the_budget_to_what_there_is() {
    let mut world = World::new(UNIT * 8);
    let id = world.add(streamed(8, 2));
    world.demand(&[page_at(id, 0), page_at(id, 1)], Bytes::ZERO).unwrap();
    world.rest().unwrap();
    world.demand(&[page_at(id, 2)], Bytes::ZERO).unwrap();
    world.refuse_create().unwrap();
    assert_eq!(world.policy.budget(), UNIT * 2);
    world.release(0).unwrap();
    assert_eq!(world.demand(&[page_at(id, 2)], Bytes::ZERO), Ok(Outcome::Granted), "by way of another page");
}
