//! Parts of files that the application asks for by itself, and asks for again in every step: registered at the second time, where
//! they are in the page cache, so that the copy engine reads them by itself from then on.
//!
//! That takes less time than a reader takes to bring the bytes, and no memory. Each part has a mapping of its own.
//!
//! Registering takes longer than reading ahead, though. What the application asks for once a run of its model stays on the device
//! during that run, and is read: in the third one it is registered as well.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use forebay_core::Bytes;
use forebay_store::FileStamp;

use super::registered::{NotRegistered, PagePlan, RegisteredPage};
use crate::Result;
use crate::state::Shared;
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
    /// Counts the application's runs of models.
    run: u32,
}

#[derive(Debug)]
struct Known {
    file: FileStamp,
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
    /// It was asked for before in this run, or in enough others.
    Again,
    Registered(Arc<RegisteredPage>),
}

impl Parts {
    /// The application is about to run a model.
    pub(super) fn begin_run(&mut self) {
        self.run = self.run.wrapping_add(1);
    }

    /// A part is asked for. To `gone` goes what was registered of its file as it was before somebody wrote to it, and of a file
    /// too many.
    pub(super) fn ask(&mut self, part: &FilePart, gone: &mut Vec<Arc<RegisteredPage>>) -> Asked {
        let file = part.file.stamp();
        let mut known = match self.files.iter().position(|known| known.file == file) {
            Some(place) => self.files.remove(place),
            None => {
                self.forget(Some(file.file()), gone);
                if self.files.len() == MOST_FILES {
                    self.files.remove(0).leave(gone);
                }
                Known { file, parts: HashMap::new() }
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
                Part::Asked { .. } => Asked::Again,
                Part::Refused => Asked::First,
            },
        };
        self.files.push(known);
        asked
    }

    /// A part was registered, or cannot be. What is not kept: the page itself where nothing is known of its file any more.
    pub(super) fn set(
        &mut self,
        part: &FilePart,
        page: Option<&Arc<RegisteredPage>>,
    ) -> Option<Arc<RegisteredPage>> {
        let now = page.map_or(Part::Refused, |page| Part::Registered(Arc::clone(page)));
        let not_kept = match self.parts_beside(part) {
            Some(parts) => parts.insert((part.offset, part.bytes), now)?,
            None => now,
        };
        not_kept.page()
    }

    /// A part has a copy in memory of the application's: it is not asked for any more. What was registered of it.
    pub(super) fn copied(&mut self, part: &FilePart) -> Option<Arc<RegisteredPage>> {
        let asked = Part::Asked { run: self.run, earlier: 0 };
        let known = self.parts_beside(part)?.get_mut(&(part.offset, part.bytes))?;
        std::mem::replace(known, asked).page()
    }

    /// What is known of the parts of a part's file.
    fn parts_beside(&mut self, part: &FilePart) -> Option<&mut HashMap<(u64, Bytes), Part>> {
        let file = part.file.stamp();
        self.files.iter_mut().find(|known| known.file == file).map(|known| &mut known.parts)
    }

    /// Nothing is known any more of the file of this device and inode; without one, of any.
    pub(super) fn forget(&mut self, file: Option<(u64, u64)>, gone: &mut Vec<Arc<RegisteredPage>>) {
        let is_meant = |known: &mut Known| file.is_none_or(|file| file == known.file.file());
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
        let Some(page) = self.registered_part(part)? else { return Ok(false) };
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
    fn registered_part(&self, part: &FilePart) -> Result<Option<Arc<RegisteredPage>>> {
        let mut state = self.state.lock();
        state.check()?;
        if state.stop {
            // Without readers, who say so.
            return Ok(None);
        }
        let asked = state.registering.ask(part);
        if state.registering.has_leaving() {
            self.register.notify_one();
        }
        match asked {
            Asked::Registered(page) => return Ok(Some(page)),
            Asked::Again if part.bytes > Bytes::ZERO => {}
            Asked::Again | Asked::First => return Ok(None),
        }
        let plan = PagePlan::of_part(&part.file, part.offset, part.bytes);
        let size = plan.size();
        if !state.registering.begin_part(size) {
            return Ok(None);
        }
        drop(state);
        let made = self.register(&plan);
        let mut state = self.state.lock();
        state.registering.end_part(part, size, made.as_ref());
        drop(state);
        made.map(Some).or_else(|error| {
            tracing::debug!(device = %self.id, %error, "a part of a file was not registered");
            Ok(None)
        })
    }

    fn register(&self, plan: &PagePlan) -> std::result::Result<Arc<RegisteredPage>, NotRegistered> {
        let mapped = plan.map()?;
        let began = self.timeline.begin();
        let made = mapped.register(&self.device)?;
        self.timeline.note(Activity::Register, 0, began);
        Ok(Arc::new(made))
    }
}
