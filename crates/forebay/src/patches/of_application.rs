//! The same arithmetic in memory of the application's.

use forebay_device::{AddLowRank, DeviceAddr, Element, Requantize, StreamHandle, Transform};

use super::Product;
use crate::{Engine, Result};

impl Engine {
    /// Has a product added to memory of the application's, which begins with the product's first row, behind what is in the
    /// stream: for who wants to know what it gives.
    ///
    /// # Errors
    /// What the device reports; also that it cannot do it.
    ///
    /// # Safety
    /// The rows are memory of this device and nobody else's until the work has ended, and the factors unchanged; the stream is
    /// one of the device and lives as long.
    pub unsafe fn add_product(
        &self,
        at: DeviceAddr,
        element: Element,
        product: &Product,
        stream: StreamHandle,
    ) -> Result<()> {
        let Product { rows, factors } = product;
        let (columns, rows) = (u64::from(factors.columns), rows.start.into()..u64::from(rows.end));
        let (first, count) = (rows.start * columns, rows.end.saturating_sub(rows.start) * columns);
        let add = AddLowRank { at, first, count, element, factors: *factors };
        self.shared().state.lock().check()?;
        // SAFETY: the caller's promise.
        unsafe { self.shared().device.transform(&Transform::AddLowRank(add), stream) }.map_err(Into::into)
    }

    /// Has a weight of eight-bit elements computed anew in memory of the application's, behind what is in the stream; with
    /// `scaling` once the numbers are found that it is scaled by.
    ///
    /// # Errors
    /// What the device reports; also that it cannot do it.
    ///
    /// # Safety
    /// As of [`add_product`](Engine::add_product): what is read, and what is written.
    pub unsafe fn requantize(
        &self,
        work: &Requantize,
        scaling: Option<&Scaling>,
        stream: StreamHandle,
    ) -> Result<()> {
        self.shared().state.lock().check()?;
        let finding = scaling.map(|Scaling { largest, table, to }| {
            let (sum, at) = (work.sum, *largest);
            [Transform::Largest { sum, at }, Transform::LookUp { number: at, table: *table, to: *to }]
        });
        let all = finding.into_iter().flatten().chain([Transform::Requantize(*work)]);
        for transform in all {
            // SAFETY: the caller's promise.
            unsafe { self.shared().device.transform(&transform, stream) }?;
        }
        Ok(())
    }
}

/// How the numbers are found that a weight is scaled by: those that belong to its largest magnitude.
#[derive(Clone, Copy, Debug)]
pub struct Scaling {
    /// A float32 of at least 0, which becomes the largest magnitude where that is larger: see [`Transform::Largest`].
    pub largest: DeviceAddr,
    /// Two float32 for each such number: see [`Transform::LookUp`].
    pub table: DeviceAddr,
    /// Where the two go.
    pub to: DeviceAddr,
}
