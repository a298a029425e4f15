//! Weights that are stored in another type of element than they are used in: converted on their way to the page.
//!
//! A kernel reads the stored bytes from a reader's pinned slot, over the link, and writes the page. So nothing of the
//! device's memory is needed beside the page, and the copy engine goes on with others.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use forebay_core::Bytes;
use forebay_device::{Convert, DeviceAddr, Element, Scale, Transform};
use forebay_store::{Segment, Source};

use crate::layout::WeightSpec;
use crate::{EngineError, Result};

/// How a weight is converted while its pages are filled: `used[n] = stored[n] * scale`, in float32, rounded once.
#[derive(Clone)]
pub struct Conversion {
    /// The stored elements.
    pub from: Element,
    /// The elements as they are used; [`Element::is_target`].
    pub to: Element,
    /// What they are multiplied with; written by now.
    pub scale: StoredScale,
    /// Keeps the scale's memory on the device.
    pub keep: Arc<dyn Any + Send + Sync>,
}

/// The scale of a weight that is converted, on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredScale {
    /// None.
    None,
    /// One float32 for all elements.
    One(DeviceAddr),
    /// One float32 for each row of a row-major weight.
    Rows {
        /// The first row's.
        at: DeviceAddr,
        /// Elements a row.
        columns: u64,
    },
}

/// A part of a page that is converted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConvertedPart {
    pub(crate) weight: u32,
    /// The number of its first element in the weight, and how many there are.
    pub(crate) first: u64,
    pub(crate) count: u64,
    /// Where in the page they go.
    pub(crate) to: Bytes,
}

impl Conversion {
    /// The length of a weight as it is used.
    pub(crate) fn used_len(&self, spec: &WeightSpec) -> Result<Bytes> {
        let (stored, size) = (spec.source.len().get(), self.from.size().get());
        let rows = match self.scale {
            StoredScale::Rows { columns, .. } => columns > 0 && (stored / size).is_multiple_of(columns),
            _ => true,
        };
        let count = (stored.is_multiple_of(size) && rows && self.to.is_target()).then_some(stored / size);
        count.and_then(|count| count.checked_mul(self.to.size().get())).map(Bytes::new).ok_or_else(|| {
            EngineError::Invalid(format!(
                "{stored} bytes are not converted from {:?} to {:?} with {:?}: weight {:?}",
                self.from, self.to, self.scale, spec.name
            ))
        })
    }
}

impl ConvertedPart {
    /// The part in pieces whose stored bytes fit a slot.
    pub(crate) fn pieces(self, conversion: &Conversion, slot: Bytes) -> impl Iterator<Item = ConvertedPart> {
        // Every piece begins where a kernel loads many elements at once.
        let most = slot.get() / conversion.from.size().get() / 64 * 64;
        (0..self.count.div_ceil(most)).map(move |n| {
            let skipped = n * most;
            ConvertedPart {
                first: self.first + skipped,
                count: most.min(self.count - skipped),
                to: self.to + Bytes::new(skipped * conversion.to.size().get()),
                ..self
            }
        })
    }

    /// The stored bytes, as a reader takes them to the start of its slot.
    pub(crate) fn stored(&self, conversion: &Conversion, source: &Source) -> Segment {
        let size = conversion.from.size().get();
        let (source_offset, len) = (self.first * size, self.count * size);
        Segment { source: source.clone(), source_offset, dst_offset: 0, len }
    }

    /// What writes the part to its page from its stored bytes.
    pub(crate) fn transform(
        &self,
        conversion: &Conversion,
        page: DeviceAddr,
        stored: *const u8,
    ) -> Transform {
        let scale = match conversion.scale {
            StoredScale::None => Scale::None,
            StoredScale::One(at) => Scale::One(at),
            StoredScale::Rows { at, columns } => Scale::Rows { at, first: self.first, columns },
        };
        Transform::Convert(Convert {
            to: page.offset(self.to),
            to_element: conversion.to,
            // Pinned memory has the same address for the device.
            from: DeviceAddr::new(stored.expose_provenance() as u64),
            from_element: conversion.from,
            count: self.count,
            scale,
        })
    }
}

impl fmt::Debug for Conversion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Conversion { from, to, scale, .. } = self;
        f.debug_struct("Conversion")
            .field("from", from)
            .field("to", to)
            .field("scale", scale)
            .finish_non_exhaustive()
    }
}
