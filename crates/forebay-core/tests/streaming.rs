//! Explore.
mod common;
use common::engine::Engine;
use common::{UNIT, page_at, streamed};
use forebay_core::*;

#[test]
fn explore() {
    for lag in [0usize, 1, 2] {
        for w in [2u32, 4] {
            let n = 24;
            println!("lag {lag} window {w}");
            for b in (lag as u64).max(1)..=n as u64 {
                let mut e = Engine::new(UNIT * b, lag);
                let mut m = e.attach(streamed(n, w));
                let passes: Vec<_> = (0..8).map(|_| e.pass(&mut m).expect("pass")).collect();
                let p = passes.last().expect("p").clone();
                let res =
                    (0..n).filter(|&i| e.world.policy.state(page_at(m.id, i)) == PageState::Resident).count();
                println!(
                    "B={b:2} n-B={:2} fills {:?} most {} waits {} wm {} resident {res}",
                    n as u64 - b,
                    passes.iter().map(|p| p.fills).collect::<Vec<_>>(),
                    p.most,
                    p.waits,
                    e.world.policy.watermark(m.id).0
                );
            }
        }
    }
    for (n, b, low) in [
        (24u32, 16u64, 8u64),
        (24, 16, 15),
        (24, 20, 4),
        (200, 100, 80),
        (200, 150, 20),
        (200, 190, 100),
        (24, 24, 10),
    ] {
        let mut e = Engine::new(UNIT * b, 1);
        let mut m = e.attach(streamed(n, 4));
        let mut wm = vec![];
        let mut fills = vec![];
        for i in 0..16 {
            if i == 4 {
                e.world.set_budget(UNIT * low).expect("b");
            }
            if i == 6 {
                e.world.set_budget(UNIT * b).expect("b");
            }
            fills.push(e.pass(&mut m).expect("pass").fills);
            wm.push(e.world.policy.watermark(m.id).0);
        }
        println!("n {n} b {b} low {low}: wm {wm:?} fills {fills:?}");
    }
}
