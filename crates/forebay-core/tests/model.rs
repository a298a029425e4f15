//! The policy against a naive model: random events, every promise checked after each.

mod common;

use common::world::World;
use common::{Checked, UNIT, ensure, page_at};
use forebay_core::{Bytes, Mode, Outcome, RankOrder, VbarId, VbarSpec};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// An event. Numbers stand for the VBAR, page, operation... of that number, modulo how many there are.
#[derive(Clone, Debug)]
enum Event {
    Demand {
        vbar: u8,
        pages: Vec<u8>,
        reserved: u8,
    },
    PinUnasked {
        vbar: u8,
        page: u8,
    },
    Release {
        operation: u8,
    },
    Plan {
        vbar: u8,
        page: u8,
    },
    Unplan {
        vbar: u8,
        page: u8,
    },
    Execute {
        commands: u8,
    },
    Fill {
        nth: u8,
    },
    FailFill {
        nth: u8,
    },
    RefuseCreate,
    Settle,
    /// Uses one page again and again, long enough for calm.
    Churn {
        vbar: u8,
        page: u8,
        times: u8,
    },
    Touch {
        vbar: u8,
        uses: u8,
    },
    /// Uses VBARs in turn, a few pages each.
    Alternate {
        vbars: Vec<u8>,
        page: u8,
        pages: u8,
        rounds: u8,
    },
    Prioritize {
        vbar: u8,
    },
    Deprioritize {
        vbar: u8,
    },
    SetBudget {
        units: u8,
    },
    MakeRoom {
        units: u8,
    },
    Discard {
        vbar: u8,
        page: u8,
    },
    Amend {
        vbar: u8,
        page: u8,
    },
    FreeFrom {
        vbar: u8,
        units: u8,
    },
    SetFloor {
        vbar: u8,
        rank: u8,
    },
    LowerWatermark {
        vbar: u8,
        rank: u8,
    },
    Add {
        spec: VbarSpec,
    },
    Close {
        vbar: u8,
    },
    Forget {
        vbar: u8,
    },
}

fn spec() -> impl Strategy<Value = VbarSpec> {
    let order = prop_oneof![
        3 => (0u32..4, 0u32..4).prop_map(|(first, last)| RankOrder::Spread { first, last }),
        1 => (0u32..4, 0u32..4, 1u32..4).prop_map(|(first, last, len)| RankOrder::SpreadRuns {
            first,
            last,
            // Neighbours share a page.
            runs: (0..40 / len).map(|n| (n * len, (n + 1) * len)).collect(),
        }),
        1 => Just(RankOrder::Address),
    ];
    let mode = prop_oneof![2 => Just(Mode::Streamed), 1 => Just(Mode::Explicit)];
    (1u32..=24, prop::sample::select(vec![1u64, 1, 2, 4]), order, mode, (0u32..=8, 0u32..=6)).prop_map(
        |(pages, units, order, mode, (window, uses_a_pass))| VbarSpec {
            pages,
            page_size: UNIT * units,
            order: if mode == Mode::Explicit { RankOrder::Address } else { order },
            mode,
            window,
            uses_a_pass,
        },
    )
}

fn event() -> impl Strategy<Value = Event> {
    let (vbar, any, page) = (0u8..6, any::<u8>(), 0u8..24);
    prop_oneof![
        24 => (vbar.clone(), prop::collection::vec(page.clone(), 1..=4), prop_oneof![3 => Just(0u8), 1 => 0u8..8])
            .prop_map(|(vbar, pages, reserved)| Event::Demand { vbar, pages, reserved }),
        4 => (vbar.clone(), page.clone()).prop_map(|(vbar, page)| Event::PinUnasked { vbar, page }),
        20 => any.prop_map(|operation| Event::Release { operation }),
        16 => (vbar.clone(), page.clone()).prop_map(|(vbar, page)| Event::Plan { vbar, page }),
        5 => (vbar.clone(), page.clone()).prop_map(|(vbar, page)| Event::Unplan { vbar, page }),
        8 => (1u8..8).prop_map(|commands| Event::Execute { commands }),
        12 => any.prop_map(|nth| Event::Fill { nth }),
        2 => any.prop_map(|nth| Event::FailFill { nth }),
        2 => Just(Event::RefuseCreate),
        6 => Just(Event::Settle),
        1 => (vbar.clone(), page.clone(), 60u8..80)
            .prop_map(|(vbar, page, times)| Event::Churn { vbar, page, times }),
        3 => (vbar.clone(), 0u8..12).prop_map(|(vbar, uses)| Event::Touch { vbar, uses }),
        5 => (prop::collection::vec(vbar.clone(), 2..=4), page.clone(), 0u8..8, 1u8..8)
            .prop_map(|(vbars, page, pages, rounds)| Event::Alternate { vbars, page, pages, rounds }),
        2 => vbar.clone().prop_map(|vbar| Event::Prioritize { vbar }),
        2 => vbar.clone().prop_map(|vbar| Event::Deprioritize { vbar }),
        5 => (0u8..50).prop_map(|units| Event::SetBudget { units }),
        2 => (0u8..12).prop_map(|units| Event::MakeRoom { units }),
        2 => (vbar.clone(), page.clone()).prop_map(|(vbar, page)| Event::Discard { vbar, page }),
        3 => (vbar.clone(), page.clone()).prop_map(|(vbar, page)| Event::Amend { vbar, page }),
        2 => (vbar.clone(), 0u8..12).prop_map(|(vbar, units)| Event::FreeFrom { vbar, units }),
        3 => (vbar.clone(), 0u8..26).prop_map(|(vbar, rank)| Event::SetFloor { vbar, rank }),
        3 => (vbar.clone(), 0u8..26).prop_map(|(vbar, rank)| Event::LowerWatermark { vbar, rank }),
        1 => spec().prop_map(|spec| Event::Add { spec }),
        1 => vbar.clone().prop_map(|vbar| Event::Close { vbar }),
        1 => vbar.prop_map(|vbar| Event::Forget { vbar }),
    ]
}

fn run(world: &mut World, event: &Event) -> Checked {
    let ids: Vec<VbarId> = world.books.ids().collect();
    let mut ids: Vec<_> = ids.into_iter().collect();
    ids.sort_unstable();
    let id = |vbar: u8| ids[vbar as usize % ids.len()];
    let page = |world: &World, vbar: u8, page: u8| {
        let id = id(vbar);
        page_at(id, u32::from(page) % world.books.vbar(id).spec.pages)
    };
    if ids.is_empty() && !matches!(event, Event::Add { .. }) {
        return Ok(());
    }
    match *event {
        Event::Demand { vbar, ref pages, reserved } => {
            let mut wanted: Vec<_> = pages.iter().map(|&n| page(world, vbar, n)).collect();
            let mut seen = std::collections::BTreeSet::new();
            wanted.retain(|&page| seen.insert(page));
            world.demand(&wanted, UNIT * u64::from(reserved)).map(drop)
        }
        Event::PinUnasked { vbar, page: n } => {
            world.pin_unasked(page(world, vbar, n));
            Ok(())
        }
        Event::Release { operation } => match world.held_operations() {
            0 => Ok(()),
            n => world.release(operation as usize % n),
        },
        Event::Plan { vbar, page: n } => world.plan(page(world, vbar, n)).map(drop),
        Event::Unplan { vbar, page: n } => world.unplan(page(world, vbar, n)),
        Event::Execute { commands } => world.execute(commands.into()),
        Event::Fill { nth } => match world.pages_filling() {
            0 => world.execute(1),
            n => world.fill(nth as usize % n),
        },
        Event::FailFill { nth } => match world.pages_filling() {
            0 => world.execute(1),
            n => world.fail_fill(nth as usize % n),
        },
        Event::RefuseCreate => world.refuse_create(),
        Event::Settle => world.settle(),
        Event::Churn { vbar, page: n, times } => {
            for _ in 0..times {
                let page = page(world, vbar, n);
                if world.demand(&[page], Bytes::ZERO)? != Outcome::Granted {
                    break;
                }
                world.settle()?;
                world.release(world.held_operations() - 1)?;
            }
            Ok(())
        }
        Event::Touch { vbar, uses } => world.touch(id(vbar), uses.into()),
        Event::Alternate { ref vbars, page: from, pages, rounds } => {
            for _ in 0..rounds {
                for &vbar in vbars {
                    take_turn(world, id(vbar), from, pages)?;
                }
            }
            Ok(())
        }
        Event::Prioritize { vbar } => world.prioritize(id(vbar)),
        Event::Deprioritize { vbar } => world.deprioritize(id(vbar)),
        Event::SetBudget { units } => world.set_budget(UNIT * u64::from(units)),
        Event::MakeRoom { units } => world.make_room(UNIT * u64::from(units)),
        Event::Discard { vbar, page: n } => world.discard(page(world, vbar, n)),
        Event::Amend { vbar, page: n } => world.amend(page(world, vbar, n)),
        Event::FreeFrom { vbar, units } => world.free_from(id(vbar), UNIT * u64::from(units)),
        Event::SetFloor { vbar, rank } => world.set_floor(id(vbar), rank.into()),
        Event::LowerWatermark { vbar, rank } => world.lower_watermark(id(vbar), rank.into()),
        Event::Add { ref spec } if ids.len() < 6 => {
            world.add(spec.clone());
            world.verify()
        }
        Event::Add { .. } => Ok(()),
        Event::Close { vbar } => world.close(id(vbar)),
        Event::Forget { vbar } => world.forget(id(vbar)).map(drop),
    }
}

/// Uses some pages one after the other, each read ahead while the one before is in use.
fn take_turn(world: &mut World, id: VbarId, from: u8, pages: u8) -> Checked {
    let count = world.books.vbar(id).spec.pages;
    world.touch(id, 1)?;
    for page in u32::from(from)..u32::from(from) + u32::from(pages) {
        let [page, next] = [page, page + 1].map(|page| page_at(id, page % count));
        if world.demand(&[page], Bytes::ZERO)? == Outcome::Granted {
            world.unplan(page)?;
            world.plan(next)?;
            world.settle()?;
            world.release(world.held_operations() - 1)?;
        }
    }
    Ok(())
}

/// At rest no frame is lost: what fits is granted, and what is closed can go.
fn check_liveness(world: &mut World, pages: &[u8]) -> Checked {
    world.rest()?;
    let ids: Vec<_> = world.books.ids().collect();
    for id in ids {
        let vbar = world.books.vbar(id);
        if vbar.closing {
            ensure!(world.forget(id)?, "{id:?} is closed and unused, and holds pages");
            continue;
        }
        if vbar.spec.mode == Mode::Explicit {
            continue;
        }
        let fitting = (world.budget.get() / vbar.spec.page_size.get()) as usize;
        let mut wanted: Vec<_> = pages.iter().map(|&n| page_at(id, u32::from(n) % vbar.spec.pages)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        wanted.truncate(fitting);
        if !wanted.is_empty() {
            let outcome = world.demand(&wanted, Bytes::ZERO)?;
            ensure!(outcome == Outcome::Granted, "at rest {wanted:?} were {outcome:?}");
            world.rest()?;
        }
    }
    Ok(())
}

fn check(specs: Vec<VbarSpec>, budget: u8, eager: bool, events: Vec<Event>, last: Vec<u8>) -> Checked {
    let mut world = World::new(UNIT * u64::from(budget));
    for spec in specs {
        world.add(spec);
    }
    for event in &events {
        run(&mut world, event).map_err(|wrong| format!("{event:?}: {wrong}"))?;
        if eager {
            world.settle()?;
        }
    }
    check_liveness(&mut world, &last)
}

/// `cases`, unless PROPTEST_CASES says otherwise.
fn cases(cases: u32) -> ProptestConfig {
    let default = ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    };
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => default,
        None => ProptestConfig { cases, ..default },
    }
}

proptest! {
    #![proptest_config(cases(12_000))]

    #[test]
    fn every_promise_holds_whatever_happens(
        specs in prop::collection::vec(spec(), 1..4),
        budget in 1u8..50,
        eager in any::<bool>(),
        events in prop::collection::vec(event(), 1..120),
        last in prop::collection::vec(0u8..24, 1..=6),
    ) {
        check(specs, budget, eager, events, last).map_err(TestCaseError::fail)?;
    }
}
