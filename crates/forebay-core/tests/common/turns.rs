//! VBARs used in turn, written down the slow way.

use forebay_core::{Mode, VbarId, VbarSpec};

use super::books::Books;

impl Books {
    /// Whether the last two stays, and this one so far, were of so many passes at most.
    fn stays_at_most(&self, id: VbarId, passes: f64) -> bool {
        let vbar = self.vbar(id);
        let at_most = |uses: &u64| *uses as f64 <= passes * f64::from(vbar.spec.uses_a_pass);
        vbar.spec.mode == Mode::Streamed
            && !vbar.closing
            && vbar.stays.len() >= 2
            && vbar.stays.iter().rev().take(2).chain([&vbar.uses]).all(at_most)
    }

    pub(crate) fn is_in_turn(&self, id: VbarId) -> bool {
        self.stays_at_most(id, 1.5)
    }

    /// Those used in turn at the top of the priorities, lowest first.
    pub(crate) fn group(&self) -> Vec<VbarId> {
        let mut group: Vec<_> = self.ids().collect();
        if let Some(last_other) = group.iter().rposition(|&id| !self.is_in_turn(id)) {
            group.drain(..=last_other);
        }
        if group.len() > 1 && self.pays_to_share(&group) { group } else { vec![] }
    }

    /// Those that share memory with a VBAR, itself among them.
    pub(crate) fn sharing(&self, id: VbarId) -> Vec<VbarId> {
        let group = self.group();
        if group.contains(&id) { group } else { vec![id] }
    }

    /// Another VBAR is used.
    pub(crate) fn end_stay(&mut self) {
        if let Some(last) = self.in_use.take() {
            let vbar = self.vbar_mut(last);
            match std::mem::take(&mut vbar.uses) {
                0 => {}
                uses => vbar.stays.push(uses),
            }
        }
    }

    pub(crate) fn forget_stays(&mut self, id: VbarId) {
        let vbar = self.vbar_mut(id);
        vbar.stays.clear();
        (vbar.uses, vbar.missed, vbar.holds_back) = (0, 0, false);
    }

    pub(crate) fn prioritize(&mut self, id: VbarId) {
        if self.in_use != Some(id) {
            self.end_stay();
        }
        self.in_use = Some(id);
        self.forget_stays(id);
        self.raise(id);
    }

    pub(crate) fn deprioritize(&mut self, id: VbarId) {
        self.forget_stays(id);
        if self.in_use == Some(id) {
            self.in_use = None;
        }
        self.priority.retain(|&other| other != id);
        self.priority.insert(0, id);
    }

    fn raise(&mut self, id: VbarId) {
        self.priority.retain(|&other| other != id);
        self.priority.push(id);
        let vbar = self.vbar_mut(id);
        (vbar.missed, vbar.holds_back) = (0, false);
    }

    /// The VBAR is used. Where its watermark has to stand then.
    pub(crate) fn touch(&mut self, id: VbarId, uses: u32, watermark: impl Fn(VbarId) -> u32) -> u32 {
        let (pages, mut expected) = (self.vbar(id).spec.pages, watermark(id));
        let (last, top) = (self.in_use, self.priority.last().copied());
        if last != Some(id) {
            self.end_stay();
            self.in_use = Some(id);
        }
        if last != Some(id) && top != Some(id) {
            let follows = last.filter(|_| last == top && self.is_in_turn(id));
            if follows.is_some_and(|last| self.is_in_turn(last)) {
                self.pass_over_those_below(id);
                self.raise(id);
                self.vbar_mut(id).holds_back = !self.group().is_empty();
                let level = if self.vbar(id).holds_back { self.common_level(id, &watermark) } else { pages };
                expected = expected.max(level);
            } else if let Some(last) = follows.filter(|&last| self.stays_at_most(last, 8.0)) {
                self.raise(id);
                self.vbar_mut(id).holds_back = true;
                self.priority.retain(|&other| other != last);
                self.priority.push(last);
            } else {
                self.raise(id);
                expected = pages;
            }
        }
        self.vbar_mut(id).uses += u64::from(uses);
        let vbar = self.vbar(id);
        if vbar.holds_back && vbar.uses as f64 > 1.5 * f64::from(vbar.spec.uses_a_pass) {
            self.raise(id);
            expected = pages;
        }
        if self.vbar(id).closing { watermark(id) } else { expected }
    }

    fn pass_over_those_below(&mut self, id: VbarId) {
        let group = self.group();
        let below = group.iter().position(|&member| member == id).unwrap_or(0);
        for &passed_over in &group[..below] {
            self.vbar_mut(passed_over).missed += 1;
            if self.vbar(passed_over).missed > 4 {
                self.forget_stays(passed_over);
            }
        }
    }

    /// Whether VBARs stream less when they share the budget than when each takes from the next.
    fn pays_to_share(&self, vbars: &[VbarId]) -> bool {
        let sum = |pages: &dyn Fn(&VbarSpec) -> u32| -> u64 {
            let bytes = |spec: &VbarSpec| spec.page_size.get() * u64::from(pages(spec));
            vbars.iter().map(|&id| bytes(&self.vbar(id).spec)).sum()
        };
        let missing = sum(&|spec| spec.pages).saturating_sub(self.budget.get());
        missing > 0 && missing + sum(&|spec| spec.window.min(spec.pages)) <= missing * vbars.len() as u64
    }

    /// The most pages of a VBAR that are no larger a share than all together keep.
    fn common_level(&self, id: VbarId, watermark: impl Fn(VbarId) -> u32) -> u32 {
        let bytes = |pages: u32, id| (self.vbar(id).spec.page_size * u64::from(pages)).get();
        let group = self.group();
        let kept: u64 = group.iter().map(|&member| bytes(watermark(member), member)).sum();
        let all: u64 = group.iter().map(|&member| bytes(self.vbar(member).spec.pages, member)).sum();
        let pages = self.vbar(id).spec.pages;
        (0..=pages).rfind(|&level| u64::from(level) * all <= u64::from(pages) * kept).unwrap_or(0)
    }

    /// The VBAR with the largest share of its pages, down from the highest rank that it keeps and that may go.
    pub(crate) fn largest(&self, sharing: &[VbarId], floors: bool) -> Option<VbarId> {
        let share = |id: VbarId| {
            let vbar = self.vbar(id);
            let kept = self.pages_of(id).filter(|&page| vbar.kept(self.page(page)));
            let top = kept.map(|page| self.rank(page)).max()?;
            (top >= vbar.floor || !floors).then(|| f64::from(top + 1) / f64::from(vbar.spec.pages))
        };
        let mut largest = None;
        for &id in sharing {
            if share(id) > largest.and_then(share) {
                largest = Some(id);
            }
        }
        largest
    }
}
