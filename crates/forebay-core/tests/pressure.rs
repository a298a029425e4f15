//! A budget that falls below what is held.

mod common;

use common::world::World;
use common::{UNIT, page_at, streamed};
use forebay_core::{Bytes, Outcome};

#[test]
fn what_is_over_the_budget_leaves_with_its_pins() {
    let mut world = World::new(UNIT * 4);
    let id = world.add(streamed(8, 2));
    let pages = [0, 1, 2].map(|page| page_at(id, page));
    for page in pages {
        world.demand(&[page], Bytes::ZERO).unwrap();
    }
    world.settle().unwrap();
    world.set_budget(UNIT).unwrap();
    assert_eq!(world.policy.held(), UNIT * 3, "all are pinned");
    for held in [2, 1, 1] {
        world.release(0).unwrap();
        assert_eq!(world.policy.held(), UNIT * held);
    }
}

#[test]
fn a_demand_that_is_undone_keeps_nothing_over_the_budget() {
    let mut world = World::new(UNIT * 4);
    let id = world.add(streamed(8, 2));
    let pages = [0, 1, 2].map(|page| page_at(id, page));
    for page in pages {
        world.demand(&[page], Bytes::ZERO).unwrap();
    }
    world.settle().unwrap();
    world.set_budget(UNIT * 2).unwrap();
    world.prioritize(id).unwrap();
    assert_eq!(world.demand(&[pages[0], page_at(id, 3)], Bytes::ZERO), Ok(Outcome::Blocked));
    world.release(0).unwrap();
    assert_eq!(world.policy.held(), UNIT * 2);
}
