//! What the state knows of registered page cache.

use std::collections::{BTreeSet, HashMap};
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_core::{Bytes, PageRef, PageState, Rank, VbarId};

use super::parts::{Asked, Parts};
use super::registered::{NotRegistered, PageKey, PagePlan, RegisteredPage};
use crate::state::State;
use crate::transfer::FilePart;

/// How long what is registered is kept for a model that is gone, in case it is attached again.
const KEPT: Duration = Duration::from_secs(10);
/// Fills after which a page is worth registering that stays on the device while its model is used: it was lost to others
/// twice.
const OFTEN: u32 = 3;
/// Fills through the ring after which a page is registered though it is not quiet. Until all pages are registered steps take
/// longer: of 24 GB for some six steps 1.8 to 1.1 of the limit, where readers alone reach 1.2 and, with the host's memory slow,
/// 1.5 to 1.8. From then on 1.03 to 1.08. Twenty steps take 5.9 s together, 6.4 with nothing registered
/// (2026-11-29-h200-registering).
const LATE: u32 = 2;
/// Refusals by the device after which it is not asked any more.
pub(super) const MOST_REFUSALS: u32 = 3;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Registering {
    /// Streamed pages that went through the ring, by rank, to be registered once it is quiet.
    wanted: BTreeSet<(Rank, PageRef)>,
    /// Those that went through it so often that it pays in any case.
    due: BTreeSet<(Rank, PageRef)>,
    /// Pages of models that are gone.
    kept: HashMap<PageKey, Arc<RegisteredPage>>,
    /// Parts that the application has copies of by now. While it makes them it registers memory, too, beside which giving back takes
    /// both twice as long.
    copied: Vec<Arc<RegisteredPage>>,
    /// When the latest of these was added.
    kept_since: Option<Instant>,
    /// What the application asks for by itself.
    parts: Parts,
    /// Parts that are being registered.
    parts_under_way: usize,
    /// How many the device refused one after the other.
    parts_refused: u32,
    /// Pages that nobody copies from any more, to be given back.
    leaving: Vec<Arc<RegisteredPage>>,
    /// The most that may be registered, as set by the application.
    limit: Option<Bytes>,
    /// The most that may be registered, by what is free. Nothing before that was looked at.
    room: Bytes,
    /// Bytes registered.
    held: Bytes,
    /// The device does not register, or refused too often.
    off: bool,
}

impl Registering {
    pub(crate) fn new(limit: Option<Bytes>) -> Self {
        Registering {
            wanted: BTreeSet::new(),
            due: BTreeSet::new(),
            kept: HashMap::new(),
            copied: Vec::new(),
            kept_since: None,
            parts: Parts::default(),
            parts_under_way: 0,
            parts_refused: 0,
            leaving: Vec::new(),
            limit,
            room: Bytes::ZERO,
            held: Bytes::ZERO,
            off: limit == Some(Bytes::ZERO),
        }
    }

    /// Sets the most that may be registered; what is over is given back.
    pub(crate) fn set_limit(&mut self, limit: Option<Bytes>) {
        (self.limit, self.off) = (limit, limit == Some(Bytes::ZERO));
        if self.off {
            self.wanted.clear();
            self.due.clear();
            self.drop_kept();
        }
    }

    /// What is free by the latest look at the host's memory.
    pub(crate) fn set_room(&mut self, room: Bytes) {
        self.room = room;
    }

    /// Whether nothing may be registered, or can.
    pub(crate) fn is_off(&self) -> bool {
        self.off
    }

    /// Bytes registered.
    pub(crate) fn held(&self) -> Bytes {
        self.held
    }

    /// By how much what is registered exceeds what the application allows, and what is free.
    pub(crate) fn over(&self) -> (Bytes, Bytes) {
        let over_limit = self.held.saturating_sub(self.limit.unwrap_or(Bytes::MAX));
        (over_limit, self.held.saturating_sub(self.room))
    }

    pub(crate) fn has_room_for(&self, bytes: Bytes) -> bool {
        !self.off && self.held + bytes <= self.room.min(self.limit.unwrap_or(Bytes::MAX))
    }

    /// The next page to be registered: one that is due, else any if it is quiet. It may have been registered meanwhile.
    pub(crate) fn take_wanted(&mut self, is_quiet: bool) -> Option<(Rank, PageRef)> {
        self.due.pop_first().or_else(|| is_quiet.then(|| self.wanted.pop_first()).flatten())
    }

    pub(crate) fn put_back(&mut self, wanted: (Rank, PageRef)) {
        self.wanted.insert(wanted);
    }

    pub(crate) fn has_wanted(&self) -> bool {
        !self.wanted.is_empty() || !self.due.is_empty()
    }

    /// Whether there is something that a thread has to come back to, though nobody calls it.
    pub(crate) fn has_rest(&self) -> bool {
        self.held > Bytes::ZERO || self.has_wanted()
    }

    pub(crate) fn registered(&mut self, size: Bytes) {
        self.held += size;
    }

    pub(crate) fn given_back(&mut self, size: Bytes) {
        self.held = self.held.saturating_sub(size);
    }

    pub(crate) fn let_go(&mut self, pages: impl IntoIterator<Item = Arc<RegisteredPage>>) {
        self.leaving.extend(pages);
    }

    /// Up to `most` pages to be given back: not those that somebody is about to enqueue copies from, which would not be
    /// behind any mark yet.
    pub(crate) fn take_leaving(&mut self, most: usize) -> Vec<RegisteredPage> {
        let mut taken = Vec::new();
        let mut busy = Vec::new();
        while taken.len() < most
            && let Some(page) = self.leaving.pop()
        {
            // Nobody can share it anew: it is in no book.
            match Arc::try_unwrap(page) {
                Ok(page) => taken.push(page),
                Err(page) => busy.push(page),
            }
        }
        self.leaving.append(&mut busy);
        taken
    }

    pub(crate) fn has_leaving(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// Lets go of what nobody needs now: what is kept for models that are gone, and what has copies.
    pub(crate) fn drop_kept(&mut self) {
        self.leaving.extend(mem::take(&mut self.kept).into_values());
        self.leaving.append(&mut self.copied);
    }

    /// The application is about to run a model, and to ask for parts of its file.
    pub(crate) fn begin_run(&mut self) {
        self.parts.begin_run();
    }

    /// A part of a file is asked for, to go to a page that keeps it, or to other memory.
    pub(crate) fn ask(&mut self, part: &FilePart, page: Option<PageRef>) -> Asked {
        self.parts.ask(part, page, &mut self.leaving)
    }

    /// A page loses what it has.
    pub(crate) fn left(&mut self, page: PageRef) {
        self.parts.left(page);
    }

    /// The model is gone whose pages these are: what they have is not asked for again.
    pub(crate) fn forget_pages(&mut self, vbar: VbarId) {
        self.parts.forget_pages(vbar);
    }

    /// The next part to be registered in the background.
    pub(crate) fn take_wanted_part(&mut self) -> Option<FilePart> {
        self.parts.take_wanted()
    }

    pub(crate) fn has_wanted_part(&self) -> bool {
        self.parts.has_wanted()
    }

    /// Makes room for a part of so many bytes, which is registered next. Whether there is some.
    pub(crate) fn begin_part(&mut self, size: Bytes) -> bool {
        let has_room = self.has_room_for(size);
        if has_room {
            self.held += size;
            self.parts_under_way += 1;
        }
        has_room
    }

    /// A part of so many bytes was registered, or cannot be.
    pub(super) fn end_part(
        &mut self,
        part: &FilePart,
        size: Bytes,
        made: std::result::Result<&Arc<RegisteredPage>, &NotRegistered>,
    ) {
        self.parts_under_way -= 1;
        let not_kept = self.parts.set(part, made.ok());
        self.leaving.extend(not_kept);
        match made {
            Ok(_) => self.parts_refused = 0,
            Err(error) => {
                self.given_back(size);
                self.parts_refused += u32::from(error.is_the_devices());
                if error.is_for_good() || self.parts_refused >= MOST_REFUSALS {
                    self.set_limit(Some(Bytes::ZERO));
                }
            }
        }
    }

    /// Nothing is registered any more, and everything given back.
    pub(crate) fn end(&mut self) {
        self.set_limit(Some(Bytes::ZERO));
        self.drop_kept();
        self.forget_file(None);
    }

    /// Whether something is still to be given back.
    pub(crate) fn is_ending(&self) -> bool {
        self.has_leaving() || self.parts_under_way > 0
    }

    /// A part of a file has a copy in memory of the application's.
    pub(crate) fn part_copied(&mut self, part: &FilePart) {
        if let Some(page) = self.parts.copied(part) {
            self.copied.push(page);
            self.kept_since = Some(Instant::now());
        }
    }

    /// Nothing of a file that is told by its device and inode is asked for any more; without one, of none.
    pub(crate) fn forget_file(&mut self, file: Option<(u64, u64)>) {
        self.parts.forget(file, &mut self.leaving);
        // Whatever file they are of.
        self.leaving.append(&mut self.copied);
    }

    /// Lets go of some of what has been kept long enough.
    pub(crate) fn expire(&mut self, most: usize) {
        if self.kept_since.is_some_and(|since| since.elapsed() >= KEPT) {
            let keys: Vec<_> = self.kept.keys().take(most).cloned().collect();
            let expired = keys.iter().filter_map(|key| self.kept.remove(key));
            self.leaving.extend(expired);
            let copied = self.copied.len().min(most);
            self.leaving.extend(self.copied.drain(..copied));
        }
    }

    pub(crate) fn has_kept(&self) -> bool {
        !self.kept.is_empty() || !self.copied.is_empty()
    }

    fn keep(&mut self, key: PageKey, page: Arc<RegisteredPage>) {
        self.kept_since = Some(Instant::now());
        // The same bytes may have been registered for two models.
        self.leaving.extend(self.kept.insert(key, page));
    }
}

impl State {
    /// A VBAR opened: what is still registered of its files is its own again.
    pub(crate) fn adopt_kept(&mut self, id: VbarId) {
        if !self.registering.has_kept() {
            return;
        }
        let vbar = Arc::clone(&self.books.vbar(id).vbar);
        let Some(layout) = &vbar.layout else { return };
        for number in 0..layout.pages {
            let kept = layout.registration(number).and_then(|plan| self.registering.kept.remove(&plan.key()));
            if kept.is_some() {
                self.books.page(vbar.page_ref(number)).registered = kept;
            }
        }
    }

    /// A VBAR closes: none of its pages is wanted, what is registered is kept for a while.
    pub(crate) fn keep_registered(&mut self, id: VbarId) {
        self.registering.wanted.retain(|(_, page)| page.vbar != id);
        self.registering.due.retain(|(_, page)| page.vbar != id);
        let vbar = Arc::clone(&self.books.vbar(id).vbar);
        let Some(layout) = &vbar.layout else { return };
        for number in 0..layout.pages {
            let Some(registered) = self.books.page(vbar.page_ref(number)).registered.take() else { continue };
            match layout.registration(number) {
                Some(plan) if !self.registering.off => self.registering.keep(plan.key(), registered),
                _ => self.registering.let_go([registered]),
            }
        }
    }

    /// Whether it is worth registering: a page that is streamed, or one that stays and is lost to others again and again.
    fn is_filled_often(&mut self, page: PageRef) -> bool {
        !self.policy.is_kept(page) || self.books.page(page).fills >= OFTEN
    }

    /// A page was filled, from the ring unless it is registered. Whether the keeper has something to do at once.
    pub(crate) fn went_through_ring(&mut self, page: PageRef) -> bool {
        let entry = self.books.page(page);
        if entry.registered.is_some() || entry.stays_in_ring || self.registering.off {
            return false;
        }
        entry.fills = entry.fills.saturating_add(1);
        let is_late = entry.fills >= LATE;
        if self.is_filled_often(page) {
            let wanted = (self.policy.rank(page), page);
            match is_late {
                true => self.registering.due.insert(wanted),
                false => self.registering.wanted.insert(wanted),
            };
        }
        !self.registering.due.is_empty()
    }

    /// What registering a page takes, if its bytes lie in files, not too scattered.
    pub(crate) fn plan_of(&mut self, page: PageRef) -> Option<PagePlan> {
        let vbar = Arc::clone(&self.books.vbars.get(&page.vbar)?.vbar);
        let plan = vbar.layout.as_ref()?.registration(page.page.0);
        self.books.page(page).stays_in_ring = plan.is_none();
        plan
    }

    /// Whether a page that went through the ring is still worth registering.
    pub(crate) fn is_still_wanted(&mut self, page: PageRef) -> bool {
        self.is_open(page.vbar)
            && self.is_filled_often(page)
            && !self.exceeds_cache(page.vbar)
            && self.books.page(page).registered.is_none()
    }

    /// Lets go of `bytes` of registered pages: those of models that are gone, those that are resident, then those of the
    /// highest ranks, and last parts of files that the application asks for by itself.
    pub(crate) fn let_go_of(&mut self, bytes: Bytes) {
        if self.registering.has_kept() {
            return self.registering.drop_kept();
        }
        let policy = &self.policy;
        let mut held: Vec<(bool, Rank, PageRef, Bytes)> = Vec::new();
        for book in self.books.vbars.values() {
            for (number, entry) in (0..).zip(&book.pages) {
                let Some(registered) = &entry.registered else { continue };
                let page = book.vbar.page_ref(number);
                let is_resident = policy.state(page) == PageState::Resident;
                held.push((is_resident, policy.rank(page), page, registered.size()));
            }
        }
        held.sort_unstable_by(|a, b| b.cmp(a));
        let mut gone = Bytes::ZERO;
        for (_, _, page, size) in held {
            if gone >= bytes {
                break;
            }
            gone += size;
            let registered = self.books.page(page).registered.take();
            self.registering.let_go(registered);
        }
        let Registering { parts, leaving, .. } = &mut self.registering;
        parts.let_go(bytes.saturating_sub(gone), leaving);
    }
}
