//! Pages whose contents are out of date leave as soon as they can, and nobody gets them before they were filled again.

mod common;

use std::collections::{HashMap, HashSet};

use common::{UNIT, page_at, streamed};
use forebay_core::{Bytes, Command, Outcome, PageRef, Pins, Policy, VbarId};

/// Pins that only the test moves.
#[derive(Default)]
struct Counters {
    pins: HashMap<PageRef, u32>,
    stale: HashSet<PageRef>,
}

impl Pins for Counters {
    fn pin(&mut self, page: PageRef) {
        *self.pins.entry(page).or_default() += 1;
    }

    fn unpin(&mut self, page: PageRef) {
        *self.pins.entry(page).or_default() -= 1;
    }

    fn claim(&mut self, page: PageRef) -> bool {
        self.pins.get(&page).is_none_or(|&pins| pins == 0)
    }

    fn set_stale(&mut self, page: PageRef) {
        self.stale.insert(page);
    }

    fn set_streamed(&mut self, page: PageRef) -> bool {
        !self.claim(page)
    }

    fn set_resident(&mut self, _: PageRef) {}
}

struct Script {
    policy: Policy,
    id: VbarId,
    pins: Counters,
    out: Vec<Command>,
}

impl Script {
    fn new() -> Self {
        let mut policy = Policy::new(UNIT * 4);
        let id = policy.add_vbar(streamed(4, 2));
        Script { policy, id, pins: Counters::default(), out: Vec::new() }
    }

    fn page(&self) -> PageRef {
        page_at(self.id, 0)
    }

    fn demand(&mut self) -> Outcome {
        self.policy.demand(&[self.page()], Bytes::ZERO, &mut self.pins, &mut self.out)
    }

    fn fill(&mut self) {
        self.policy.filled(self.page(), &mut self.pins, &mut self.out);
    }

    fn release(&mut self) {
        self.pins.unpin(self.page());
        self.policy.released(self.page(), &mut self.pins, &mut self.out);
    }

    fn outdate(&mut self) -> bool {
        self.policy.outdate(self.page(), &mut self.pins, &mut self.out)
    }

    /// Demands, fills and releases the page as a new one.
    fn is_filled_anew(&mut self) {
        self.out.clear();
        assert_eq!(self.demand(), Outcome::Granted);
        assert!(
            self.out.iter().any(|command| matches!(command, Command::Map { page, .. } if page.page.0 == 0))
        );
        self.fill();
        assert!(!self.policy.is_stale(self.page()));
        self.release();
        assert_eq!(self.policy.held_pages(self.id), 1, "it stays");
    }
}

#[test]
fn a_page_that_is_changed_where_it_is_keeps_its_frame_and_leaves_nobody_a_page_that_is_not_there() {
    let mut script = Script::new();
    let page = script.page();
    assert!(!script.policy.amend(page, &mut script.pins), "it is not there");
    assert_eq!(script.demand(), Outcome::Granted);
    assert!(!script.policy.amend(page, &mut script.pins), "it is not filled");
    script.fill();
    assert!(!script.policy.amend(page, &mut script.pins), "it is in use");
    script.release();
    script.out.clear();
    assert!(script.policy.amend(page, &mut script.pins));
    assert!(!script.policy.amend(page, &mut script.pins), "it is not there yet");
    assert_eq!(script.demand(), Outcome::Granted);
    script.fill();
    script.release();
    assert_eq!(script.out, [], "nothing is mapped or retired");
    assert!(script.policy.amend(page, &mut script.pins));
    assert!(!script.outdate(), "it leaves once it is there");
    script.fill();
    assert_eq!(script.policy.held_pages(script.id), 0);
    script.is_filled_anew();
    script.pins.pin(page);
    assert!(!script.outdate());
    script.pins.unpin(page);
    assert!(!script.policy.amend(page, &mut script.pins), "it is out of date");
}

#[test]
fn a_page_that_nobody_uses_leaves_at_once() {
    let mut script = Script::new();
    assert!(script.outdate(), "it is not there");
    assert_eq!(script.demand(), Outcome::Granted);
    script.fill();
    script.pins.unpin(script.page());
    assert!(script.outdate());
    assert_eq!(script.policy.held_pages(script.id), 0);
    script.is_filled_anew();
}

#[test]
fn a_page_in_use_leaves_with_its_last_pin_and_is_given_to_nobody_else() {
    let mut script = Script::new();
    assert_eq!(script.demand(), Outcome::Granted);
    script.fill();
    assert!(!script.outdate());
    assert!(script.pins.stale.contains(&script.page()));
    assert_eq!(script.demand(), Outcome::Blocked);
    assert_eq!(script.pins.pins[&script.page()], 1);
    script.release();
    assert_eq!(script.policy.held_pages(script.id), 0);
    script.is_filled_anew();
}

#[test]
fn a_page_that_is_being_filled_is_filled_again() {
    for demanded in [false, true] {
        let mut script = Script::new();
        match demanded {
            true => assert_eq!(script.demand(), Outcome::Granted),
            false => assert!(script.policy.plan(script.page(), &mut script.pins, &mut script.out)),
        }
        assert!(!script.outdate());
        assert_eq!(script.demand(), Outcome::Blocked);
        script.fill();
        if demanded {
            assert!(script.policy.is_stale(script.page()), "whoever asked before keeps what there was");
            script.release();
        }
        assert_eq!(script.policy.held_pages(script.id), 0);
        script.is_filled_anew();
    }
}

#[test]
fn a_fill_that_fails_leaves_nothing_out_of_date() {
    let mut script = Script::new();
    assert!(script.policy.plan(script.page(), &mut script.pins, &mut script.out));
    assert!(!script.outdate());
    script.policy.failed(script.page(), &mut script.out);
    assert!(!script.policy.is_stale(script.page()));
    script.is_filled_anew();
}
