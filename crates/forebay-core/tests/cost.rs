//! What a decision costs does not depend on how many pages there are.

use std::collections::HashMap;

use forebay_core::{
    Bytes, Command, Mode, Outcome, PageIndex, PageRef, Pins, Policy, Rank, RankOrder, VbarId, VbarSpec,
};

const PAGE: Bytes = Bytes::mib(2);
const A_PASS: u32 = 50;

#[derive(Default)]
struct Counters(HashMap<PageRef, u32>);

impl Pins for Counters {
    fn pin(&mut self, page: PageRef) {
        *self.0.entry(page).or_default() += 1;
    }

    fn unpin(&mut self, page: PageRef) {
        *self.0.entry(page).or_default() -= 1;
    }

    fn claim(&mut self, page: PageRef) -> bool {
        !self.set_streamed(page)
    }

    fn set_streamed(&mut self, page: PageRef) -> bool {
        self.0.get(&page).is_some_and(|&pins| pins > 0)
    }

    fn set_stale(&mut self, _: PageRef) {}

    fn set_resident(&mut self, _: PageRef) {}
}

fn spec(pages: u32) -> VbarSpec {
    VbarSpec {
        pages,
        page_size: PAGE,
        order: RankOrder::Spread { first: 0, last: 0 },
        mode: Mode::Streamed,
        window: 4,
        uses_a_pass: A_PASS,
    }
}

/// A policy that fills every page at once.
struct Script {
    policy: Policy,
    vbar: VbarId,
    pins: Counters,
    out: Vec<Command>,
    costs: Vec<(&'static str, u64)>,
}

impl Script {
    fn new(pages: u32, frames: u32) -> Self {
        let mut policy = Policy::new(PAGE * u64::from(frames));
        let vbar = policy.add_vbar(spec(pages));
        Script { policy, vbar, pins: Counters::default(), out: Vec::new(), costs: Vec::new() }
    }

    fn page(&self, page: u32) -> PageRef {
        PageRef { vbar: self.vbar, page: PageIndex(page) }
    }

    /// Notes what an event costs, with the fills that follow from it.
    fn event(
        &mut self,
        name: &'static str,
        event: impl FnOnce(&mut Policy, &mut Counters, &mut Vec<Command>),
    ) {
        let before = self.policy.steps();
        event(&mut self.policy, &mut self.pins, &mut self.out);
        for command in std::mem::take(&mut self.out) {
            if let Command::Map { page, .. } = command {
                self.policy.filled(page, &mut self.pins, &mut self.out);
            }
        }
        self.costs.push((name, self.policy.steps() - before));
    }

    fn demand(&mut self, name: &'static str, page: u32) {
        let page = self.page(page);
        self.event(name, |policy, pins, out| {
            assert_eq!(policy.demand(&[page], Bytes::ZERO, pins, out), Outcome::Granted);
        });
    }

    fn plan(&mut self, name: &'static str, page: u32) {
        let page = self.page(page);
        self.event(name, |policy, pins, out| assert!(policy.plan(page, pins, out)));
    }

    fn release(&mut self, page: u32) {
        let page = self.page(page);
        self.pins.unpin(page);
        self.event("released", |policy, pins, out| policy.released(page, pins, out));
    }

    fn used(&mut self, pages: u32) {
        for page in 0..pages {
            self.demand("", page);
            self.release(page);
        }
        self.costs.clear();
    }

    /// Every event that an engine tells of, with all frames taken. Page `absent` has none.
    fn every_event(mut self, absent: u32) -> Vec<(&'static str, u64)> {
        let vbar = self.vbar;
        self.demand("demand, there", 0);
        self.release(0);
        self.demand("demand, evicting", absent);
        self.release(absent);
        self.plan("plan, there", 0);
        self.plan("plan, evicting", absent + 1);
        let planned = self.page(absent + 1);
        self.event("unplan", |policy, _, _| policy.unplan(planned));
        self.event("prioritize", |policy, _, _| policy.prioritize(vbar));
        self.event("free from", |policy, pins, out| {
            assert_eq!(policy.free_from(vbar, PAGE, pins, out), PAGE)
        });
        self.event("make room", |policy, pins, out| assert_eq!(policy.make_room(PAGE, pins, out), PAGE));
        self.event("set floor", |policy, _, _| policy.set_floor(vbar, Rank(8)));
        self.event("budget", |policy, pins, out| {
            policy.set_budget(policy.held().saturating_sub(PAGE), pins, out);
        });
        self.event("deprioritize", |policy, _, _| policy.deprioritize(vbar));
        self.costs
    }
}

const SIZES: [u32; 3] = [100, 10_000, 1_000_000];

#[test]
fn no_event_costs_more_when_the_model_is_larger() {
    let costs = SIZES.map(|pages| {
        let mut script = Script::new(pages, 64);
        script.used(80);
        script.every_event(90)
    });
    assert_eq!(costs[0], costs[1]);
    assert_eq!(costs[0], costs[2]);
    assert!(costs[0].iter().all(|&(_, steps)| steps <= 8), "{:?}", costs[0]);
}

#[test]
fn no_event_costs_more_when_more_is_resident() {
    let costs = SIZES.map(|pages| {
        let mut script = Script::new(pages, pages - 10);
        script.used(pages - 10);
        script.every_event(pages - 5)
    });
    assert_eq!(costs[0], costs[1]);
    assert_eq!(costs[0], costs[2]);
}

/// Two VBARs used in turn, and each event of a turn.
fn turns(pages: u32) -> Vec<(&'static str, u64)> {
    let mut script = Script::new(pages, 64);
    let vbars = [script.vbar, script.policy.add_vbar(spec(pages))];
    let turn = |script: &mut Script, vbar: VbarId| {
        script.vbar = vbar;
        script.event("touch", |policy, _, _| policy.touch(vbar, A_PASS));
    };
    for vbar in [vbars; 4].concat() {
        turn(&mut script, vbar);
        script.used(A_PASS);
    }
    for vbar in vbars {
        turn(&mut script, vbar);
        assert!(script.policy.watermark(vbar).0 < pages, "it shares");
        script.demand("demand, evicting", A_PASS);
        script.release(A_PASS);
        script.plan("plan, evicting", A_PASS + 1);
        let held = script.policy.held();
        script.event("budget", |policy, pins, out| policy.set_budget(held.saturating_sub(PAGE), pins, out));
    }
    script.costs
}

#[test]
fn no_turn_costs_more_when_the_models_are_larger() {
    let costs = SIZES.map(turns);
    assert_eq!(costs[0], costs[1]);
    assert_eq!(costs[0], costs[2]);
    assert!(costs[0].iter().all(|&(_, steps)| steps <= 24), "{:?}", costs[0]);
}
