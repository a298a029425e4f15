//! A policy and the naive picture of what it decides, driven together: every call is checked.

use std::collections::{HashMap, VecDeque};

use forebay_core::{Bytes, Command, FrameId, Mode, Outcome, PageRef, Policy, Rank, VbarId, VbarSpec};

use super::books::{Asked, Books, Standing};
use super::machine::Machine;
use super::{Checked, ensure};

/// Releases after which a watermark may rise.
const CALM: u32 = 64;

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) policy: Policy,
    pub(crate) books: Books,
    /// Executes every command at the moment it is given.
    pub(crate) ledger: Machine,
    /// Executes commands late, as an engine does.
    device: Machine,
    queue: VecDeque<Command>,
    /// Mapped on the device, contents on the way.
    filling: Vec<PageRef>,
    /// The pins of each operation that is under way.
    holdings: Vec<Vec<PageRef>>,
    pub(crate) budget: Bytes,
}

impl World {
    pub(crate) fn new(budget: Bytes) -> Self {
        World {
            policy: Policy::new(budget),
            books: Books::new(budget),
            ledger: Machine::default(),
            device: Machine::default(),
            queue: VecDeque::new(),
            filling: Vec::new(),
            holdings: Vec::new(),
            budget,
        }
    }

    pub(crate) fn add(&mut self, spec: VbarSpec) -> VbarId {
        let id = self.policy.add_vbar(spec.clone());
        self.books.add(id, spec);
        id
    }

    /// Demands pages, all different and of one VBAR, and holds them until [`release`](World::release).
    pub(crate) fn demand(&mut self, pages: &[PageRef], reserved: Bytes) -> Checked<Outcome> {
        let id = pages[0].vbar;
        let pins = self.books.pins();
        let needed: Bytes = pages.iter().map(|&page| self.books.size(page)).sum();
        let watermark = self.policy.watermark(id).0;
        let refused = pages.iter().any(|&page| {
            let vbar = self.books.vbar(id);
            let above = vbar.spec.mode == Mode::Explicit && self.books.rank(page) >= watermark;
            !self.books.page(page).backed && (above || vbar.closing)
        });
        let outcome = self.call(Asked::Demand(pages.to_vec()), |policy, books, out| {
            policy.demand(pages, reserved, books, out)
        })?;
        let too_large = needed + reserved > self.budget;
        ensure!(
            too_large == matches!(outcome, Outcome::TooLarge { .. }),
            "{needed} and {reserved} reserved of {}: {outcome:?}",
            self.budget
        );
        if outcome == Outcome::Granted {
            ensure!(!refused, "{pages:?} granted, though one is above the watermark or its VBAR closes");
            for (pins, &page) in pages.iter().map(|page| (self.books.page(*page).pins, page)) {
                ensure!(pins > 0, "{page} was granted without a pin");
            }
            let added: u32 = self.books.pins().iter().sum::<u32>() - pins.iter().sum::<u32>();
            ensure!(added as usize == pages.len(), "{added} pins for {} pages", pages.len());
            self.holdings.push(pages.to_vec());
        } else {
            ensure!(self.books.pins() == pins, "{outcome:?} left pins");
            self.check_not_granted(pages, outcome, refused)?;
        }
        Ok(outcome)
    }

    /// Blocked and refused demands really had nothing to take.
    fn check_not_granted(&self, pages: &[PageRef], outcome: Outcome, refused: bool) -> Checked {
        let vbar = self.books.vbar(pages[0].vbar);
        let (earlier, failed) = (&pages[..self.books.given], pages.get(self.books.given));
        match outcome {
            Outcome::Granted | Outcome::TooLarge { .. } => Ok(()),
            Outcome::Refused if refused => Ok(()),
            Outcome::Refused => {
                ensure!(vbar.spec.mode == Mode::Explicit, "a streamed demand was refused");
                let own_watermark_fell = self.books.tried.iter().any(|page| page.vbar == pages[0].vbar);
                let mut left = self.books.victims_for(*failed.expect("a refused page"));
                left.retain(|page| !pages.contains(page));
                let kept = failed.is_some_and(|&page| self.policy.is_kept(page));
                ensure!(!kept, "a page was refused that is below the watermark");
                ensure!(own_watermark_fell || left.is_empty(), "refused, while {left:?} could have gone");
                Ok(())
            }
            Outcome::Blocked => {
                ensure!(vbar.spec.mode == Mode::Streamed, "an explicit demand was blocked");
                let stuck = |page: &PageRef| {
                    matches!(self.books.standing(*page), Standing::Pinned | Standing::Filling)
                        || earlier.contains(page)
                };
                let held = self.books.pages().filter(stuck).chain(failed.copied());
                let least: Bytes = held.map(|page| self.books.size(page)).sum();
                ensure!(
                    least > self.budget,
                    "blocked, though {least} of {} are all that pins and fills hold",
                    self.budget
                );
                Ok(())
            }
        }
    }

    /// Pins a filled page as a caller does that does not ask the policy.
    pub(crate) fn pin_unasked(&mut self, page: PageRef) {
        if matches!(self.books.standing(page), Standing::Absent | Standing::Filling) {
            return;
        }
        self.books.page_mut(page).pins += 1;
        self.holdings.push(vec![page]);
    }

    pub(crate) fn held_operations(&self) -> usize {
        self.holdings.len()
    }

    /// Ends one of the operations under way.
    pub(crate) fn release(&mut self, operation: usize) -> Checked {
        for page in self.holdings.remove(operation) {
            let entry = self.books.page_mut(page);
            entry.pins -= 1;
            if entry.pins == 0 && entry.streamed {
                self.released(page)?;
            }
        }
        Ok(())
    }

    fn released(&mut self, page: PageRef) -> Checked {
        let before = self.policy.watermark(page.vbar).0;
        let unused = self.budget.saturating_sub(self.ledger.held()) + self.ledger.free();
        let sharing = self.books.sharing(page.vbar);
        let size = self.books.size(page);
        let held: Bytes = sharing.iter().map(|&id| self.bytes(id, self.policy.held_pages(id))).sum();
        let frames = held + size * (unused.get() / size.get());
        let watermarks: HashMap<_, _> =
            self.books.ids().map(|id| (id, self.policy.watermark(id).0)).collect();
        self.books.vbar_mut(page.vbar).calm += 1;
        self.call(Asked::Leave(page), |policy, books, out| policy.released(page, books, out))?;
        let (now, vbar) = (self.policy.watermark(page.vbar).0, self.books.vbar(page.vbar));
        ensure!(now <= before + 1, "one release raised the watermark from {before} to {now}");
        if now > before {
            ensure!(vbar.spec.mode == Mode::Streamed && !vbar.closing, "this watermark may not rise");
            ensure!(vbar.calm > CALM, "the watermark rose after {} calm releases", vbar.calm);
            let wanted = |&id: &VbarId| {
                let spec = &self.books.vbar(id).spec;
                self.bytes(
                    id,
                    (watermarks[&id].max(self.policy.watermark(id).0) + spec.window).min(spec.pages),
                )
            };
            let wanted: Bytes = sharing.iter().map(wanted).sum();
            ensure!(frames >= wanted, "the watermark rose to {now}: {frames} to be had, {wanted} wanted");
        }
        Ok(())
    }

    pub(crate) fn plan(&mut self, page: PageRef) -> Checked<bool> {
        let pins = self.books.pins();
        let standing = self.books.standing(page);
        let planned = self.call(Asked::Plan(page), |policy, books, out| policy.plan(page, books, out))?;
        ensure!(self.books.pins() == pins, "read-ahead pinned something");
        ensure!(planned || standing == Standing::Absent, "a page with a frame can be planned");
        ensure!(planned == self.books.page(page).backed, "planned: {planned}, but its frame says otherwise");
        if planned {
            self.books.page_mut(page).upcoming += 1;
            if standing == Standing::Spent {
                self.books.waits(page);
            }
        }
        Ok(planned)
    }

    /// Takes a plan back, if there is one.
    pub(crate) fn unplan(&mut self, page: PageRef) -> Checked {
        if self.books.page(page).upcoming > 0 {
            self.books.page_mut(page).upcoming -= 1;
            self.call(Asked::Nothing, |policy, _, _| policy.unplan(page))?;
        }
        Ok(())
    }

    pub(crate) fn touch(&mut self, id: VbarId, uses: u32) -> Checked {
        let before: HashMap<_, _> = self.books.ids().map(|id| (id, self.policy.watermark(id).0)).collect();
        let expected = self.books.touch(id, uses, |id| before[&id]);
        self.policy.touch(id, uses);
        for (&one, &before) in &before {
            let (now, expected) = (self.policy.watermark(one).0, if one == id { expected } else { before });
            ensure!(
                now == expected,
                "{id:?} was used, and the watermark of {one:?} is at {now}, not {expected}"
            );
        }
        self.verify()
    }

    pub(crate) fn prioritize(&mut self, id: VbarId) -> Checked {
        self.books.prioritize(id);
        let before = self.policy.watermark(id).0;
        self.policy.prioritize(id);
        let vbar = self.books.vbar(id);
        let open = if vbar.closing { before } else { vbar.spec.pages };
        let now = self.policy.watermark(id).0;
        ensure!(now == open, "prioritized, the watermark stands at {now} of {open}");
        self.verify()
    }

    pub(crate) fn deprioritize(&mut self, id: VbarId) -> Checked {
        self.books.deprioritize(id);
        self.call(Asked::Nothing, |policy, _, _| policy.deprioritize(id))
    }

    fn bytes(&self, id: VbarId, pages: u32) -> Bytes {
        self.books.vbar(id).spec.page_size * u64::from(pages)
    }

    pub(crate) fn set_floor(&mut self, id: VbarId, rank: u32) -> Checked {
        let pages = self.books.vbar(id).spec.pages;
        self.books.vbar_mut(id).floor = rank.min(pages);
        self.call(Asked::Nothing, |policy, _, _| policy.set_floor(id, Rank(rank)))
    }

    pub(crate) fn lower_watermark(&mut self, id: VbarId, rank: u32) -> Checked {
        let expected = self.policy.watermark(id).0.min(rank);
        self.call(Asked::LowerTo(id, rank), |policy, books, out| {
            policy.lower_watermark(id, Rank(rank), books, out);
        })?;
        let now = self.policy.watermark(id).0;
        ensure!(now == expected, "lowered to {rank}, the watermark stands at {now}, not {expected}");
        Ok(())
    }

    pub(crate) fn set_budget(&mut self, budget: Bytes) -> Checked {
        (self.budget, self.books.budget) = (budget, budget);
        self.call(Asked::Pressure, |policy, books, out| policy.set_budget(budget, books, out))
    }

    pub(crate) fn make_room(&mut self, want: Bytes) -> Checked {
        let before = self.policy.held();
        let freed = self.call(Asked::Pressure, |policy, books, out| policy.make_room(want, books, out))?;
        ensure!(before - self.policy.held() == freed, "{freed} reported, {} before", before);
        let left: Vec<_> = self.books.pages().filter(|&page| self.books.evictable(page)).collect();
        ensure!(freed >= want || left.is_empty(), "{freed} of {want} freed, while {left:?} could have gone");
        Ok(())
    }

    pub(crate) fn free_from(&mut self, id: VbarId, want: Bytes) -> Checked {
        let before = self.policy.held();
        let freed =
            self.call(Asked::FreeFrom(id), |policy, books, out| policy.free_from(id, want, books, out))?;
        ensure!(before - self.policy.held() >= freed, "{freed} reported, {} before", before);
        let left = self.books.victims();
        ensure!(freed >= want || left.is_empty(), "{freed} of {want} freed, while {left:?} could have gone");
        Ok(())
    }

    pub(crate) fn discard(&mut self, page: PageRef) -> Checked {
        self.call(Asked::Discard(page), |policy, books, out| policy.discard(page, books, out))?;
        ensure!(!self.books.evictable(page), "{page} was discarded and is there");
        Ok(())
    }

    /// Changes a page where it is: what it is filled with afterwards comes with [`fill`](World::fill).
    pub(crate) fn amend(&mut self, page: PageRef) -> Checked {
        let before = *self.books.page(page);
        let can = before.backed && before.filled && before.pins == 0;
        let amended = self.call(Asked::Amend(page), |policy, books, _| policy.amend(page, books))?;
        ensure!(amended == can, "{page} was {before:?}, and was it amended? {amended}");
        if amended {
            ensure!(self.books.page(page).backed, "{page} has no memory any more");
            self.filling.push(page);
        }
        Ok(())
    }

    /// Begins to remove a VBAR.
    pub(crate) fn close(&mut self, id: VbarId) -> Checked {
        self.books.vbar_mut(id).closing = true;
        for page in &mut self.books.vbar_mut(id).pages {
            page.upcoming = 0;
        }
        self.call(Asked::Close(id), |policy, books, out| policy.close_vbar(id, books, out))
    }

    /// Ends the removal of a closing VBAR, once nothing is in its way.
    pub(crate) fn forget(&mut self, id: VbarId) -> Checked<bool> {
        let vbar = self.books.vbar(id);
        let ready = vbar.closing
            && vbar.pages.iter().all(|page| page.pins == 0)
            && self.policy.held_pages(id) == 0
            && !self.queue.iter().any(|command| concerns(command, id));
        if ready {
            self.policy.forget_vbar(id);
            self.books.priority.retain(|&other| other != id);
            self.books.in_use = self.books.in_use.filter(|&used| used != id);
            self.books.vbars[id.get() as usize] = None;
            self.verify()?;
        }
        Ok(ready)
    }

    /// Executes the next commands on the device.
    pub(crate) fn execute(&mut self, commands: usize) -> Checked {
        for _ in 0..commands {
            let Some(command) = self.queue.pop_front() else { break };
            let books = &self.books;
            self.device.apply(command, |page| books.size(page))?;
            if let Command::Map { page, .. } = command {
                self.filling.push(page);
            }
        }
        Ok(())
    }

    /// Executes commands up to the next frame that is to be made, which the device refuses.
    pub(crate) fn refuse_create(&mut self) -> Checked {
        let is_create = |command: &Command| matches!(command, Command::Create { .. });
        let Some(at) = self.queue.iter().position(is_create) else { return Ok(()) };
        self.execute(at)?;
        let Some(Command::Create { frame: refused, .. }) = self.queue.pop_front() else { return Ok(()) };
        let map = self.queue.iter().position(|command| frame_of_map(command) == Some(refused));
        let map = map.and_then(|at| self.queue.remove(at));
        let Some(Command::Map { page, .. }) = map else { return Err(format!("{refused:?} backs nothing")) };
        self.ledger.undo_create(page, refused);
        self.books.page_mut(page).backed = false;
        self.budget = self.budget.min(self.ledger.held());
        self.books.budget = self.budget;
        self.call(Asked::Nothing, |policy, _, _| policy.create_failed(page))
    }

    pub(crate) fn pages_filling(&self) -> usize {
        self.filling.len()
    }

    pub(crate) fn fill(&mut self, n: usize) -> Checked {
        let page = self.filling.swap_remove(n);
        self.books.page_mut(page).filled = true;
        self.call(Asked::Leave(page), |policy, books, out| policy.filled(page, books, out))
    }

    pub(crate) fn fail_fill(&mut self, n: usize) -> Checked {
        let page = self.filling.swap_remove(n);
        self.books.page_mut(page).backed = false;
        self.call(Asked::Nothing, |policy, _, out| policy.failed(page, out))
    }

    /// Executes and fills everything.
    pub(crate) fn settle(&mut self) -> Checked {
        self.execute(usize::MAX)?;
        while !self.filling.is_empty() {
            self.fill(0)?;
            self.execute(usize::MAX)?;
        }
        Ok(())
    }

    /// Ends all operations too.
    pub(crate) fn rest(&mut self) -> Checked {
        self.settle()?;
        while !self.holdings.is_empty() {
            self.release(0)?;
        }
        self.settle()
    }

    fn call<T>(
        &mut self,
        asked: Asked,
        event: impl FnOnce(&mut Policy, &mut Books, &mut Vec<Command>) -> T,
    ) -> Checked<T> {
        let watermarks: Vec<_> = self.books.ids().map(|id| (id, self.policy.watermark(id))).collect();
        let asks = match &asked {
            Asked::Demand(pages) => Some(pages[0].vbar),
            Asked::Plan(page) => Some(page.vbar),
            _ => None,
        };
        let sharing = asks.filter(|&id| self.books.vbar(id).holds_back).map(|id| self.books.sharing(id));
        let releases = matches!(asked, Asked::Leave(_));
        let may_fall = !matches!(asked, Asked::Nothing);
        self.books.begin(asked);
        let mut out = Vec::new();
        let result = event(&mut self.policy, &mut self.books, &mut out);
        for (id, before) in watermarks {
            let now = self.policy.watermark(id);
            let is_lower = |page: &&PageRef| sharing.as_ref().is_some_and(|ids| !ids.contains(&page.vbar));
            let taken = self.books.tried.iter().filter(is_lower).count() as u32;
            let may_rise = releases || (asks == Some(id) && now.0 <= before.0 + taken);
            ensure!(now <= before || may_rise, "a watermark rose from {before:?} to {now:?}");
            ensure!(now >= before || may_fall, "a watermark fell from {before:?} to {now:?}");
            if now < before {
                self.books.vbar_mut(id).calm = 0;
            }
        }
        for &page in &self.books.unkept {
            let (rank, now) = (self.books.rank(page), self.policy.watermark(page.vbar).0);
            let by_pressure = !matches!(self.books.asked, Asked::Discard(_));
            ensure!(now <= rank || !by_pressure, "{page} of rank {rank} went, the watermark stayed at {now}");
        }
        for command in out {
            let (books, held) = (&self.books, self.ledger.held());
            if let Command::Create { size, .. } = command {
                ensure!(held + size <= self.budget, "{held} and {size} more of {}", self.budget);
            }
            self.ledger.apply(command, |page| books.size(page))?;
            self.queue.push_back(command);
        }
        self.verify()?;
        Ok(result)
    }
}

fn frame_of_map(command: &Command) -> Option<FrameId> {
    match *command {
        Command::Map { frame, .. } => Some(frame),
        _ => None,
    }
}

fn concerns(command: &Command, id: VbarId) -> bool {
    match command {
        Command::Map { page, .. } | Command::Retire { page, .. } => page.vbar == id,
        Command::Create { .. } | Command::Destroy { .. } => false,
    }
}
