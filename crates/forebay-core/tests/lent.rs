//! A VBAR that is lent as a whole: asked back once, taken only when it is returned, its watermark untouched meanwhile.

use forebay_core::{Bytes, Mode, Outcome, PageIndex, PageRef, Pins, Policy, RankOrder, VbarId, VbarSpec};

const UNIT: Bytes = Bytes::mib(2);

/// Everything is pinned, or nothing.
struct Held(bool);

impl Pins for Held {
    fn pin(&mut self, _: PageRef) {}
    fn unpin(&mut self, _: PageRef) {}
    fn claim(&mut self, _: PageRef) -> bool {
        !self.0
    }
    fn set_streamed(&mut self, _: PageRef) -> bool {
        self.0
    }
    fn set_stale(&mut self, _: PageRef) {}
    fn set_resident(&mut self, _: PageRef) {}
}

fn spec(pages: u32) -> VbarSpec {
    let order = RankOrder::Spread { first: 0, last: 0 };
    VbarSpec { pages, page_size: UNIT, order, mode: Mode::Streamed, window: 2, uses_a_pass: pages }
}

/// A VBAR of four pages, all resident and lent, in a budget of four.
fn lent() -> (Policy, VbarId) {
    let mut policy = Policy::new(UNIT * 4);
    let id = policy.add_vbar(spec(4));
    for page in pages(id) {
        assert_eq!(policy.demand(&[page], Bytes::ZERO, &mut Held(false), &mut vec![]), Outcome::Granted);
        policy.filled(page, &mut Held(true), &mut vec![]);
    }
    assert!(policy.lend(id, Bytes::ZERO));
    (policy, id)
}

fn pages(id: VbarId) -> [PageRef; 4] {
    [0, 1, 2, 3].map(|page| PageRef { vbar: id, page: PageIndex(page) })
}

#[test]
fn pressure_asks_once_and_takes_as_much_as_it_needs_when_it_has_it_back() {
    let (mut policy, id) = lent();
    let mut out = vec![];
    policy.set_budget(UNIT * 3, &mut Held(true), &mut out);
    policy.set_budget(UNIT * 3, &mut Held(true), &mut out);
    assert_eq!((policy.take_recall(), policy.take_recall()), (Some(id), None));
    assert_eq!((policy.held(), policy.watermark(id).0), (UNIT * 4, 4));
    assert!(out.is_empty() && !policy.lend(id, Bytes::ZERO), "it is asked back");
    policy.returned(id, &mut Held(false), &mut out);
    assert_eq!((policy.held(), policy.watermark(id).0), (UNIT * 3, 3));
    assert!(!policy.lend(id, Bytes::ZERO), "it does not fit any more");
}

#[test]
fn a_demand_waits_for_what_is_lent_instead_of_taking_its_own() {
    let (mut policy, id) = lent();
    let other = policy.add_vbar(spec(2));
    let page = pages(other)[0];
    let demand = |policy: &mut Policy| policy.demand(&[page], Bytes::ZERO, &mut Held(false), &mut vec![]);
    assert_eq!(demand(&mut policy), Outcome::Blocked);
    assert_eq!(policy.take_recall(), Some(id));
    policy.returned(id, &mut Held(false), &mut vec![]);
    assert_eq!(demand(&mut policy), Outcome::Granted);
    assert_eq!(policy.held(), UNIT * 4);
}

#[test]
fn only_what_fits_beside_what_cannot_leave_is_lent() {
    let mut policy = Policy::new(UNIT * 4);
    let id = policy.add_vbar(spec(4));
    assert!(!policy.lend(id, UNIT));
    assert!(policy.lend(id, Bytes::ZERO));
}
