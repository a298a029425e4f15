//! Read-ahead and the pages that are expected.

mod common;

use common::world::World;
use common::{UNIT, page_at, streamed};
use forebay_core::{Bytes, Outcome, PageRef, RankOrder, VbarId, VbarSpec};

/// The pages of these numbers, filled and released.
fn filled<const N: usize>(world: &mut World, id: VbarId, pages: [u32; N]) -> [PageRef; N] {
    let pages = pages.map(|page| page_at(id, page));
    assert_eq!(world.demand(&pages, Bytes::ZERO), Ok(Outcome::Granted));
    world.rest().expect("at rest");
    pages
}

#[test]
fn a_page_in_use_does_not_cost_an_expected_one_its_frame() {
    let mut world = World::new(UNIT * 3);
    let id = world.add(VbarSpec { order: RankOrder::Address, ..streamed(8, 2) });
    let [rest, expected, used] = filled(&mut world, id, [0, 1, 2]);
    assert_eq!(world.demand(&[used], Bytes::ZERO), Ok(Outcome::Granted));
    assert_eq!(world.plan(expected), Ok(true));
    assert_eq!(world.plan(page_at(id, 3)), Ok(false), "the pages in use and expected fill the window");
    assert!([rest, expected].iter().all(|&page| world.books.page(page).backed));
}

#[test]
fn it_leaves_what_is_below_the_floor() {
    let mut world = World::new(UNIT * 2);
    let id = world.add(streamed(8, 2));
    filled(&mut world, id, [0, 1]);
    world.set_floor(id, 8).unwrap();
    assert_eq!(world.plan(page_at(id, 2)), Ok(false));
    assert_eq!(world.demand(&[page_at(id, 2)], Bytes::ZERO), Ok(Outcome::Granted), "as the last way");
}

#[test]
fn floors_of_the_own_model_hold_while_another_gives() {
    let mut world = World::new(UNIT * 2);
    let [own, other] = [world.add(streamed(8, 2)), world.add(streamed(8, 2))];
    let [floored] = filled(&mut world, own, [0]);
    let [given] = filled(&mut world, other, [0]);
    world.set_floor(own, 8).unwrap();
    assert_eq!(world.demand(&[page_at(own, 1)], Bytes::ZERO), Ok(Outcome::Granted));
    assert!(world.books.page(floored).backed);
    assert!(!world.books.page(given).backed);
}

#[test]
fn a_demand_that_is_undone_leaves_plans_as_they_were() {
    let mut world = World::new(UNIT * 2);
    let [id, other] = [world.add(streamed(8, 0)), world.add(streamed(1, 0))];
    world.demand(&[page_at(other, 0)], Bytes::ZERO).unwrap();
    world.settle().unwrap();
    world.lower_watermark(id, 0).unwrap();
    let expected = page_at(id, 0);
    assert_eq!(world.plan(expected), Ok(true));
    world.settle().unwrap();
    assert_eq!(world.demand(&[expected, page_at(id, 1)], Bytes::ZERO), Ok(Outcome::Blocked));
    assert_eq!(world.plan(page_at(id, 1)), Ok(false), "the expected page is not for the taking");
}
