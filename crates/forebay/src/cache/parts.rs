//! Parts of files that the application asks for by itself. What does not stay on the device it asks for again in every step: that
//! is registered where it is in the page cache, so that the copy engine reads it by itself from then on. It takes less time than a
//! reader takes to bring the bytes, and no memory. Each part has a mapping of its own.
//!
//! Registering takes longer than reading ahead, though. So it is done in the background, behind the readers, who bring a part at first:
//! at once where it goes to other memory than a model's pages, else when its page leaves while that model runs. Who asks for it
//! before registers it himself. What is asked for once a run stays on the device during that run, and is read: in the third one it
//! is registered as well.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::Arc;

use forebay_core::{Bytes, PageRef, VbarId};
use forebay_store::SourceFile;
use parking_lot::MutexGuard;

use super::registered::{NotRegistered, PagePlan, RegisteredPage};
use crate::Result;
use crate::state::{Shared, State};
use crate::timeline::Activity;
use crate::transfer::{FilePart, OnDevice};

/// Files whose parts are known, and parts of a file.
const MOST_FILES: usize = 16;
const MOST_PARTS: usize = 1 << 16;
/// The run in which a part is registered that is asked for once in each.
const LAST_RUN: u8 = 3;

/// Parts that were asked for. Under the state lock.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    /// The one that was asked for last comes last.
    files: Vec<Known>,
    /// What was read in this run to pages that keep it, by the page that its last byte is in: the first of them to leave.
    kept: HashMap<PageRef, Vec<FilePart>>,
    /// What is to be registered in the background, unless somebody asks for it before; with the model whose page had it.
    wanted: VecDeque<(Option<VbarId>, FilePart)>,
    /// Counts the application's runs of models.
    run: u32,
}

#[derive(Debug)]
struct Known {
    /// As it was opened when it was asked first: every call has a descriptor of its own.
    file: Arc<SourceFile>,
    /// By where they begin, and how long they are.
    parts: HashMap<(u64, Bytes), Part>,
}

#[derive(Debug)]
enum Part {
    /// It was asked for, last in this run, and before in so many others.
    Asked {
        run: u32,
        earlier: u8,
    },
    Registered(Arc<RegisteredPage>),
    /// The device or the system refused.
    Refused,
}

/// What is known of a part that is asked for.
#[derive(Debug)]
pub(crate) enum Asked {
    /// Nothing, or that it is not to be registered yet.
    First,
    /// It was asked for before in this run, or in enough others: of this file, which is open already.
    Again(Arc<SourceFile>),
    Registered(Arc<RegisteredPage>),
    /// That it cannot be registered.
    Refused,
}

impl Parts {
    /// The application is about to run a model.
    pub(super) fn begin_run(&mut self) {
        self.run = self.run.wrapping_add(1);
        self.kept.clear();
    }

    /// A part is asked for, to go to a page that keeps it, or to other memory. To `gone` goes what was registered of its file as it
    /// was before somebody wrote to it, and of a file too many.
    pub(super) fn ask(
        &mut self,
        part: &FilePart,
        page: Option<PageRef>,
        gone: &mut Vec<Arc<RegisteredPage>>,
    ) -> Asked {
        let stamp = part.file.stamp();
        let mut known = match self.files.iter().position(|known| known.file.stamp() == stamp) {
            Some(place) => self.files.remove(place),
            None => {
                self.forget(Some(stamp.file()), gone);
                if self.files.len() == MOST_FILES {
                    self.files.remove(0).leave(gone);
                }
                Known { file: Arc::clone(&part.file), parts: HashMap::new() }
            }
        };
        if known.parts.len() >= MOST_PARTS {
            gone.extend(known.parts.drain().filter_map(|(_, part)| part.page()));
        }
        let now = self.run;
        let asked = match known.parts.entry((part.offset, part.bytes)) {
            Entry::Vacant(entry) => {
                entry.insert(Part::Asked { run: now, earlier: 0 });
                Asked::First
            }
            Entry::Occupied(mut entry) => match entry.get_mut() {
                Part::Registered(page) => Asked::Registered(Arc::clone(page)),
                Part::Asked { run, earlier } if *run != now && *earlier + 2 < LAST_RUN => {
                    (*run, *earlier) = (now, *earlier + 1);
                    Asked::First
                }
                Part::Asked { .. } => Asked::Again(Arc::clone(&known.file)),
                Part::Refused => Asked::Refused,
            },
        };
        if matches!(asked, Asked::First) && part.bytes > Bytes::ZERO {
            let part = FilePart { file: Arc::clone(&known.file), ..*part };
            match page {
                Some(page) => self.kept.entry(page).or_default().push(part),
                None => self.wanted.push_back((None, part)),
            }
        }
        self.files.push(known);
        asked
    }

    /// A page loses what it has.
    pub(super) fn left(&mut self, page: PageRef) {
        let parts = self.kept.remove(&page).into_iter().flatten();
        self.wanted.extend(parts.map(|part| (Some(page.vbar), part)));
    }

    /// The model is gone whose pages these are.
    pub(super) fn forget_pages(&mut self, vbar: VbarId) {
        self.kept.retain(|page, _| page.vbar != vbar);
        self.wanted.retain(|(of, _)| *of != Some(vbar));
    }

    /// A part was registered, or cannot be. What is not kept: the page itself where nothing is known of the part any more, which was
    /// copied or forgotten meanwhile.
    pub(super) fn set(
        &mut self,
        part: &FilePart,
        page: Option<&Arc<RegisteredPage>>,
    ) -> Option<Arc<RegisteredPage>> {
        let now = page.map_or(Part::Refused, |page| Part::Registered(Arc::clone(page)));
        let known = self.parts_beside(part).and_then(|parts| parts.get_mut(&(part.offset, part.bytes)));
        let not_kept = match known {
            Some(known) => mem::replace(known, now),
            None => now,
        };
        not_kept.page()
    }

    /// A part has a copy in memory of the application's: it is not asked for any more. What was registered of it.
    pub(super) fn copied(&mut self, part: &FilePart) -> Option<Arc<RegisteredPage>> {
        self.parts_beside(part)?.remove(&(part.offset, part.bytes))?.page()
    }

    /// The next part to be registered in the background.
    pub(super) fn take_wanted(&mut self) -> Option<FilePart> {
        while let Some((_, part)) = self.wanted.pop_front() {
            let known = self.parts_beside(&part).and_then(|parts| parts.get(&(part.offset, part.bytes)));
            if matches!(known, Some(Part::Asked { .. })) {
                return Some(part);
            }
        }
        None
    }

    pub(super) fn has_wanted(&self) -> bool {
        !self.wanted.is_empty()
    }

    /// What is known of the parts of a part's file.
    fn parts_beside(&mut self, part: &FilePart) -> Option<&mut HashMap<(u64, Bytes), Part>> {
        let stamp = part.file.stamp();
        self.files.iter_mut().find(|known| known.file.stamp() == stamp).map(|known| &mut known.parts)
    }

    /// Nothing is known any more of the file of this device and inode; without one, of any.
    pub(super) fn forget(&mut self, file: Option<(u64, u64)>, gone: &mut Vec<Arc<RegisteredPage>>) {
        let is_other = |part: &FilePart| file.is_some_and(|file| file != part.file.stamp().file());
        self.wanted.retain(|(_, part)| is_other(part));
        self.kept.retain(|_, parts| {
            parts.retain(is_other);
            !parts.is_empty()
        });
        let is_meant = |known: &mut Known| file.is_none_or(|file| file == known.file.stamp().file());
        self.files.extract_if(.., is_meant).for_each(|known| known.leave(gone));
    }

    /// Lets go of `bytes` of what is registered, beginning with the file that was asked for longest ago.
    pub(super) fn let_go(&mut self, bytes: Bytes, gone: &mut Vec<Arc<RegisteredPage>>) {
        let (mut left, run) = (bytes, self.run);
        for part in self.files.iter_mut().flat_map(|known| known.parts.values_mut()) {
            if left == Bytes::ZERO {
                return;
            }
            if let Part::Registered(page) = part {
                left = left.saturating_sub(page.size());
                gone.push(Arc::clone(page));
                *part = Part::Asked { run, earlier: 0 };
            }
        }
    }
}

impl Known {
    fn leave(self, gone: &mut Vec<Arc<RegisteredPage>>) {
        gone.extend(self.parts.into_values().filter_map(Part::page));
    }
}

impl Part {
    fn page(self) -> Option<Arc<RegisteredPage>> {
        match self {
            Part::Registered(page) => Some(page),
            Part::Asked { .. } | Part::Refused => None,
        }
    }
}

impl Shared {
    /// Has the copy engine read a part from the page cache, if it was asked for often enough, and is registered or can be now. Whether
    /// it does.
    ///
    /// # Errors
    /// What the device reports of the copy, and what stopped the engine.
    ///
    /// # Safety
    /// As for [`Engine::read_to_device`](crate::Engine::read_to_device).
    pub(crate) unsafe fn copy_from_cache(&self, part: &FilePart, to: OnDevice) -> Result<bool> {
        let Some(page) = self.registered_part(part, to)? else { return Ok(false) };
        // SAFETY: nobody gives the page back while it is held here, and whoever does later waits for what is noted below; the
        // rest is the caller's promise.
        let copied = unsafe { page.copy_to(&*self.device, to.addr, to.stream) };
        // Also where the copy was refused: the device says so of earlier ones, too.
        let noted = self.part_copies.note(&self.device, to.stream);
        if noted.is_err() {
            page.stay();
        }
        copied.and(noted).map(|()| true)
    }

    /// A part that is registered, or can be now. Registering is done without a lock; others that ask for the same part
    /// meanwhile do it as well, and the last page stays.
    fn registered_part(&self, part: &FilePart, to: OnDevice) -> Result<Option<Arc<RegisteredPage>>> {
        if part.offset.saturating_add(part.bytes.get()) > part.file.len().get() {
            // The file grew after it was opened: readers find what is there.
            return Ok(None);
        }
        let mut state = self.state.lock();
        state.check()?;
        if state.stop {
            // Without readers, who say so.
            return Ok(None);
        }
        let page = state.books.page_that_keeps(to.addr, part.bytes);
        let asked = state.registering.ask(part, page);
        if state.registering.has_leaving() || state.registering.has_wanted_part() {
            self.register.notify_one();
        }
        Ok(match asked {
            Asked::Registered(page) => Some(page),
            Asked::Again(file) if part.bytes > Bytes::ZERO => {
                self.register_part(&mut state, &FilePart { file, ..*part })
            }
            Asked::Again(_) | Asked::First | Asked::Refused => None,
        })
    }

    /// Registers a part without a lock, if there is room for it.
    pub(super) fn register_part(
        &self,
        state: &mut MutexGuard<'_, State>,
        part: &FilePart,
    ) -> Option<Arc<RegisteredPage>> {
        let plan = PagePlan::of_part(&part.file, part.offset, part.bytes);
        let size = plan.size();
        if !state.registering.begin_part(size) {
            return None;
        }
        let made = MutexGuard::unlocked(state, || {
            let made = self.register(&plan);
            if let Err(error) = &made {
                tracing::debug!(device = %self.id, %error, "a part of a file was not registered");
            }
            made
        });
        state.registering.end_part(part, size, made.as_ref());
        made.ok()
    }

    fn register(&self, plan: &PagePlan) -> std::result::Result<Arc<RegisteredPage>, NotRegistered> {
        let mapped = plan.map()?;
        let began = self.timeline.begin();
        let made = mapped.register(&self.device)?;
        self.timeline.note(Activity::Register, 0, began);
        Ok(Arc::new(made))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_core::{Mode, PageIndex, Policy, RankOrder, VbarSpec};
    use forebay_device::Device;
    use forebay_device::host::{HostConfig, HostDevice};

    const LEN: Bytes = Bytes::kib(4);

    /// Parts of a file, none registered.
    fn parts(of: u64) -> Vec<FilePart> {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(of * LEN.get()).unwrap();
        let file = SourceFile::open(named.path()).unwrap();
        (0..of)
            .map(|number| FilePart { file: Arc::clone(&file), offset: number * LEN.get(), bytes: LEN })
            .collect()
    }

    fn vbar() -> VbarId {
        let (order, mode) = (RankOrder::Address, Mode::Explicit);
        let spec = VbarSpec { pages: 3, page_size: LEN, order, mode, window: 0, uses_a_pass: 0 };
        Policy::new(LEN).add_vbar(spec)
    }

    fn wanted(parts: &mut Parts) -> Vec<u64> {
        std::iter::from_fn(|| parts.take_wanted()).map(|part| part.offset / LEN.get()).collect()
    }

    #[test]
    fn in_the_background_what_does_not_stay_is_registered_unless_it_is_copied_or_forgotten() {
        let (mut known, mut gone) = (Parts::default(), Vec::new());
        let vbar = vbar();
        let pages = [0, 1, 2].map(|number| PageRef { vbar, page: PageIndex(number) });
        let [file, other] = [6, 2].map(parts);
        known.begin_run();
        for (part, page) in [(0, None), (1, Some(0)), (2, Some(0)), (3, Some(1)), (4, None), (5, Some(2))] {
            let asked = known.ask(&file[part], page.map(|page: usize| pages[page]), &mut gone);
            assert!(matches!(asked, Asked::First));
        }
        known.ask(&other[0], None, &mut gone);
        known.ask(&other[1], Some(pages[0]), &mut gone);
        assert!(known.copied(&file[4]).is_none());
        known.forget(Some(other[0].file.stamp().file()), &mut gone);
        assert_eq!(wanted(&mut known), [0]);
        assert!(!known.has_wanted());
        known.left(pages[0]);
        assert_eq!(wanted(&mut known), [1, 2]);
        known.left(pages[0]);
        known.set(&file[3], None);
        known.left(pages[1]);
        known.begin_run();
        known.left(pages[2]);
        assert!(wanted(&mut known).is_empty(), "told before, refused by the device, kept through its run");
        assert!(gone.is_empty());
    }

    #[test]
    fn what_a_model_lost_that_is_gone_is_not_registered() {
        let (mut known, mut gone) = (Parts::default(), Vec::new());
        let vbar = vbar();
        let page = PageRef { vbar, page: PageIndex(0) };
        let file = parts(3);
        known.ask(&file[0], Some(page), &mut gone);
        known.ask(&file[1], None, &mut gone);
        known.left(page);
        known.ask(&file[2], Some(page), &mut gone);
        known.forget_pages(vbar);
        assert_eq!(wanted(&mut known), [1]);
    }

    #[test]
    fn what_was_refused_is_not_registered_whoever_asks_again() {
        let (mut known, mut gone) = (Parts::default(), Vec::new());
        let file = parts(1);
        known.ask(&file[0], None, &mut gone);
        assert_eq!(wanted(&mut known), [0]);
        known.set(&file[0], None);
        assert!(matches!(known.ask(&file[0], None, &mut gone), Asked::Refused));
        assert!(!known.has_wanted());
    }

    #[test]
    fn what_was_copied_while_it_was_registered_is_not_kept() {
        let device: Arc<dyn Device> =
            Arc::new(HostDevice::new(HostConfig { registers: true, ..HostConfig::default() }).unwrap());
        let (mut known, mut gone) = (Parts::default(), Vec::new());
        let file = parts(2);
        let registered = |part: &FilePart| {
            let plan = PagePlan::of_part(&part.file, part.offset, part.bytes);
            let page = plan.map().unwrap().register(&device).ok();
            Arc::new(page.expect("the host registers"))
        };
        file.iter().for_each(|part| drop(known.ask(part, None, &mut gone)));
        let [copied, kept] = [0, 1].map(|number: usize| registered(&file[number]));
        assert!(known.copied(&file[0]).is_none());
        assert!(known.set(&file[0], Some(&copied)).is_some_and(|page| Arc::ptr_eq(&page, &copied)));
        assert!(known.set(&file[1], Some(&kept)).is_none());
        assert!(matches!(known.ask(&file[0], None, &mut gone), Asked::First));
        assert!(matches!(known.ask(&file[1], None, &mut gone), Asked::Registered(_)));
    }
}
