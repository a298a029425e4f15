//! Explicit mode: what is above the watermark is refused.

mod common;

use common::world::World;
use common::{UNIT, explicit, page_at, streamed};
use forebay_core::{Bytes, Outcome, PageState, Rank};

#[test]
fn a_fault_takes_pages_of_less_importance_only() {
    let mut world = World::new(UNIT * 3);
    let id = world.add(explicit(8));
    let [kept, first, second, wanted] = [0, 5, 6, 3].map(|page| page_at(id, page));
    world.demand(&[kept], Bytes::ZERO).unwrap();
    world.settle().unwrap();
    world.release(0).unwrap();
    world.demand(&[first, second], Bytes::ZERO).unwrap();
    world.settle().unwrap();
    assert_eq!(world.demand(&[wanted], Bytes::ZERO), Ok(Outcome::Refused), "pins hold the pages above it");
    assert_eq!(world.policy.state(kept), PageState::Resident);
    assert_eq!(world.policy.watermark(id), Rank(3));
    world.rest().unwrap();
    assert_eq!(world.policy.held_pages(id), 1, "what is above the watermark left with its pins");
}

#[test]
fn a_floor_does_not_keep_pages_above_the_watermark() {
    let mut world = World::new(UNIT);
    let id = world.add(explicit(8));
    world.set_floor(id, 8).unwrap();
    world.demand(&[page_at(id, 4)], Bytes::ZERO).unwrap();
    world.rest().unwrap();
    assert_eq!(world.demand(&[page_at(id, 3)], Bytes::ZERO), Ok(Outcome::Granted));
    assert_eq!(world.demand(&[page_at(id, 2)], Bytes::ZERO), Ok(Outcome::Refused));
    world.rest().unwrap();
}

#[test]
fn nothing_is_read_ahead_that_would_be_refused() {
    let mut world = World::new(UNIT * 8);
    let id = world.add(explicit(8));
    world.lower_watermark(id, 4).unwrap();
    assert_eq!(world.plan(page_at(id, 4)), Ok(false));
    assert_eq!(world.plan(page_at(id, 3)), Ok(true));
}

#[test]
fn a_refused_demand_leaves_no_page_above_the_watermark_behind() {
    let mut world = World::new(UNIT * 2);
    let [id, other] = [world.add(explicit(8)), world.add(streamed(1, 0))];
    world.demand(&[page_at(other, 0)], Bytes::ZERO).unwrap();
    world.settle().unwrap();
    world.demand(&[page_at(id, 5)], Bytes::ZERO).unwrap();
    world.settle().unwrap();
    world.release(1).unwrap();
    assert_eq!(world.demand(&[page_at(id, 5), page_at(id, 3)], Bytes::ZERO), Ok(Outcome::Refused));
    assert_eq!(world.policy.held_pages(id), 0);
}

#[test]
fn the_watermark_stays_down_however_calm_it_is() {
    let mut world = World::new(UNIT * 80);
    let id = world.add(explicit(80));
    for page in 0..80 {
        world.demand(&[page_at(id, page)], Bytes::ZERO).unwrap();
    }
    world.settle().unwrap();
    world.lower_watermark(id, 4).unwrap();
    world.rest().unwrap();
    assert_eq!(world.policy.watermark(id), Rank(4));
    assert_eq!(world.policy.held_pages(id), 4);
}
