//! A device that refuses one call of an engine's, each in turn.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::cell::Cell;
use std::sync::Arc;

use forebay::{Attachment, Bytes, Engine};

use super::faulty::{Call, Failure, Faulty};
use super::{Rig, Weights, pass};

/// A device, of which one call is refused.
pub struct Refusing {
    pub rig: Rig,
    device: Arc<Faulty>,
    pub engine: Arc<Engine>,
    call: Call,
    /// Calls of this kind before it.
    skipped: u32,
    was_refused: Cell<bool>,
}

impl Refusing {
    /// Has something tried with each call refused in turn that is part of it.
    pub fn one_after_another(mut tried: impl FnMut(&Refusing)) {
        for call in [Call::Transform, Call::Wait, Call::Record] {
            for skipped in 0.. {
                let rig = Rig::new();
                let device = Faulty::new(Arc::clone(&rig.device));
                let engine = super::engine_on(Arc::clone(&device) as _, Bytes::mib(64));
                let was_refused = Cell::new(false);
                let refusing = Refusing { rig, device, engine, call, skipped, was_refused };
                tried(&refusing);
                if !refusing.was_refused.get() {
                    assert!(skipped > 2, "{call:?} is part of it");
                    break;
                }
            }
        }
    }

    /// Has something done of which the call may be refused, or behind it; whether it was done.
    pub fn does(&self, work: impl FnOnce() -> forebay::Result<()>) -> bool {
        self.device.fail(self.call, Failure::Refused, self.skipped, 1);
        work().inspect_err(|error| assert!(error.to_string().contains("injected"), "{error}")).is_ok()
    }

    /// Nothing is refused any more: uses a model twice.
    pub fn check(&self, model: &Attachment, now: &Weights) {
        self.was_refused.set(self.device.hits() > 0);
        self.device.fail(self.call, Failure::Refused, 0, 0);
        self.engine.settle().unwrap();
        let mut consumer = self.rig.consumer();
        for _ in 0..2 {
            pass(model, now, &mut consumer);
        }
    }
}
