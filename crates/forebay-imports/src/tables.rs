//! What an object's dynamic section says: which slot belongs to which imported function.

use crate::image::Image;
use crate::{ImportError, Result};

/// Tags of the dynamic section (System V ABI, chapter 5).
const DT_NULL: u64 = 0;
const DT_PLTRELSZ: u64 = 2;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;
const DT_RELAENT: u64 = 9;
const DT_STRSZ: u64 = 10;
const DT_SYMENT: u64 = 11;
const DT_PLTREL: u64 = 20;
const DT_JMPREL: u64 = 23;

/// Relocations of x86-64 whose place holds a function's address and nothing else.
const R_X86_64_GLOB_DAT: u32 = 6;
const R_X86_64_JUMP_SLOT: u32 = 7;

const DYNAMIC_SIZE: usize = 16;
const RELA_SIZE: usize = 24;
const SYMBOL_SIZE: usize = 24;

/// The tables that an object's dynamic section points to.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    strings: usize,
    strings_len: usize,
    symbols: usize,
    /// Start and length of the tables of relocations.
    relocations: [(usize, usize); 2],
}

impl Tables {
    pub(crate) fn of(image: &Image) -> Result<Self> {
        let malformed = |what| ImportError::Malformed { object: image.path.clone(), what };
        let mut tables = Tables::default();
        let dynamic = image.dynamic();
        for at in dynamic.clone().step_by(DYNAMIC_SIZE) {
            let tag = image.read::<u64>(at).ok_or_else(|| malformed("the dynamic section is not mapped"))?;
            let value =
                image.read::<u64>(at + 8).ok_or_else(|| malformed("the dynamic section is not mapped"))?;
            let [all, calls] = &mut tables.relocations;
            match tag {
                DT_NULL => break,
                DT_STRTAB => tables.strings = image.address(value),
                DT_STRSZ => tables.strings_len = value as usize,
                DT_SYMTAB => tables.symbols = image.address(value),
                DT_RELA => all.0 = image.address(value),
                DT_RELASZ => all.1 = value as usize,
                DT_JMPREL => calls.0 = image.address(value),
                DT_PLTRELSZ => calls.1 = value as usize,
                DT_PLTREL if value != DT_RELA => {
                    return Err(malformed("relocations of calls without addends"));
                }
                DT_RELAENT if value as usize != RELA_SIZE => {
                    return Err(malformed("the size of a relocation"));
                }
                DT_SYMENT if value as usize != SYMBOL_SIZE => return Err(malformed("the size of a symbol")),
                _ => {}
            }
        }
        if tables.strings == 0 || tables.symbols == 0 {
            return Err(malformed("there are no symbols"));
        }
        Ok(tables)
    }

    /// The addresses of the slots of an imported function.
    pub(crate) fn slots(&self, image: &Image, function: &str) -> Result<Vec<usize>> {
        let malformed = |what| ImportError::Malformed { object: image.path.clone(), what };
        let mut slots = Vec::new();
        for (start, len) in self.relocations {
            for entry in (0..len / RELA_SIZE).map(|entry| start.saturating_add(entry * RELA_SIZE)) {
                let info = image.read::<u64>(entry.saturating_add(8));
                let info = info.ok_or_else(|| malformed("a table of relocations is not mapped"))?;
                let (symbol, kind) = ((info >> 32) as usize, info as u32);
                if !matches!(kind, R_X86_64_GLOB_DAT | R_X86_64_JUMP_SLOT)
                    || !self.is_named(image, symbol, function)
                {
                    continue;
                }
                let offset = image
                    .read::<u64>(entry)
                    .ok_or_else(|| malformed("a table of relocations is not mapped"))?;
                let slot = image.relocated(offset);
                if image.read::<usize>(slot).is_none() || !slot.is_multiple_of(align_of::<usize>()) {
                    return Err(malformed("a slot lies outside of the object"));
                }
                if !slots.contains(&slot) {
                    slots.push(slot);
                }
            }
        }
        Ok(slots)
    }

    fn is_named(&self, image: &Image, symbol: usize, name: &str) -> bool {
        let Some(at) = symbol.checked_mul(SYMBOL_SIZE).and_then(|offset| self.symbols.checked_add(offset))
        else {
            return false;
        };
        let Some(offset) = image.read::<u32>(at) else { return false };
        let (start, len) = (offset as usize, name.len() + 1);
        let fits = start.checked_add(len).is_some_and(|end| end <= self.strings_len);
        let Some(at) = self.strings.checked_add(start).filter(|_| fits) else { return false };
        image.has(at, name.as_bytes()) && image.has(at + name.len(), &[0])
    }
}
