//! What holds between any two events.

use forebay_core::{Bytes, PageState};

use super::books::Standing;
use super::world::World;
use super::{Checked, ensure};

impl World {
    pub(crate) fn verify(&self) -> Checked {
        ensure!(self.books.wrong.is_empty(), "{}", self.books.wrong.join("; "));
        self.frames_agree()?;
        self.pages_agree()?;
        self.priorities_agree()?;
        self.what_is_over_budget_is_in_use()
    }

    fn frames_agree(&self) -> Checked {
        let (held, free) = (self.ledger.held(), self.ledger.free());
        ensure!(self.policy.held() == held, "{held} of frames exist, the policy says {}", self.policy.held());
        let told = self.policy.free_frames();
        ensure!(told == free, "{free} of frames are free, the policy says {told}");
        ensure!(self.policy.budget() == self.budget, "the budget is {}", self.budget);
        Ok(())
    }

    fn pages_agree(&self) -> Checked {
        let mut backed = 0;
        for id in self.books.ids() {
            let held = self.books.vbar(id).pages.iter().filter(|page| page.backed).count();
            let told = self.policy.held_pages(id);
            ensure!(told as usize == held, "{id:?} holds {held} pages, the policy says {told}");
            backed += held;
        }
        let real = self.ledger.backed_pages();
        ensure!(real == backed, "{real} pages are mapped, {backed} should be");
        self.books.pages().try_for_each(|page| self.page_agrees(page))
    }

    fn page_agrees(&self, page: forebay_core::PageRef) -> Checked {
        let (standing, state) = (self.books.standing(page), self.policy.state(page));
        let above = self.books.rank(page) >= self.policy.watermark(page.vbar).0;
        ensure!(self.policy.is_kept(page) != above, "{page} is and is not above the watermark");
        let streamed = self.books.page(page).streamed;
        let agrees = match standing {
            Standing::Absent => state == PageState::Absent,
            Standing::Filling => state != PageState::Absent && above == (state == PageState::Streamed),
            _ => state == if streamed { PageState::Streamed } else { PageState::Resident },
        };
        ensure!(agrees, "{page} ({standing:?}) is told to be {state:?}");
        ensure!(!(above && state == PageState::Resident), "{page} is kept above the watermark");
        ensure!(!self.books.must_leave(page), "{page} stays, though nobody uses it");
        if let Some(backing) = self.ledger.backing(page) {
            let told = self.ledger.contents(page, self.policy.serial(page));
            ensure!(told == Some(backing.contents), "{page} has contents of another serial");
        }
        Ok(())
    }

    fn priorities_agree(&self) -> Checked {
        let told: Vec<_> = self.policy.priorities().collect();
        let naive: Vec<_> = self.books.priority.iter().rev().copied().collect();
        ensure!(told == naive, "the priorities are {naive:?}, the policy says {told:?}");
        let (told, used) = (self.policy.in_use(), self.books.in_use.or(naive.first().copied()));
        ensure!(told == used, "{used:?} was used last, the policy says {told:?}");
        Ok(())
    }

    fn what_is_over_budget_is_in_use(&self) -> Checked {
        let held = self.ledger.held();
        if held <= self.budget {
            return Ok(());
        }
        ensure!(self.ledger.free() == Bytes::ZERO, "{held} of {}, and free frames", self.budget);
        let idle = self.books.pages().find(|&page| self.books.evictable(page));
        ensure!(idle.is_none(), "{held} of {}, and nobody uses {idle:?}", self.budget);
        Ok(())
    }
}
