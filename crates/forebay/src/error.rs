//! What can go wrong in the engine.

use forebay_core::Bytes;
use forebay_device::{DeviceError, DeviceId};
use forebay_store::StoreError;

/// The result of an engine call.
pub type Result<T> = std::result::Result<T, EngineError>;

/// An engine call that did not do what was asked. Other weights and other attachments go on.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The device refused a call.
    #[error(transparent)]
    Device(#[from] DeviceError),

    /// A weight's bytes could not be read.
    #[error("weight {weight:?} of {model:?} cannot be read: {error}")]
    Source {
        /// The model's name.
        model: String,
        /// The weight.
        weight: String,
        /// What the source said.
        error: Box<StoreError>,
    },

    /// A part of a file could not be read or written for the application.
    #[error(transparent)]
    Transfer(StoreError),

    /// The reader threads could not be started.
    #[error(transparent)]
    Readers(StoreError),

    /// The weights of one operation do not fit, even with everything else gone.
    #[error(
        "out of memory on {device}: one operation needs {needed} of weights at once, the budget is {budget}, of which \
         {reserved} cannot leave; raise the budget or the free memory by {}",
        (*.needed + *.reserved).saturating_sub(*.budget)
    )]
    TooLarge {
        /// The device.
        device: DeviceId,
        /// Bytes of the pages that the operation needs together.
        needed: Bytes,
        /// Bytes that frames may take.
        budget: Bytes,
        /// Bytes of pages that are pinned as long as their model is attached.
        reserved: Bytes,
    },

    /// What is needed is pinned by others, and none of them lets go.
    #[error(
        "out of memory on {device}: {needed} are needed, the budget is {budget}, and {pinned} are pinned by \
         {operations} running operations and {views} live views of weights; drop the views or raise the budget. \
         Waited {waited_s:.1} s"
    )]
    AllPinned {
        /// The device.
        device: DeviceId,
        /// Bytes of the pages that the operation needs together.
        needed: Bytes,
        /// Bytes that frames may take.
        budget: Bytes,
        /// Bytes of pinned pages.
        pinned: Bytes,
        /// Operations that hold weights at this moment.
        operations: usize,
        /// Exported tensors that hold weights for as long as they live.
        views: usize,
        /// How long the call waited for them, in seconds.
        waited_s: f64,
    },

    /// Weights were to change that operations or live views hold as they were.
    #[error(
        "weights of {model:?} on {device} were given new patches and are still held as they were, by running operations or \
         live views; drop the views, and they change. Waited {waited_s:.1} s: {weights}"
    )]
    StillInUse {
        /// The model's name.
        model: String,
        /// The weights.
        weights: String,
        /// The device.
        device: DeviceId,
        /// How long the call waited for them, in seconds.
        waited_s: f64,
    },

    /// The application could not compute a weight.
    #[error("weight {weight:?} of {model:?} could not be computed: {reason}")]
    Computed {
        /// The model's name.
        model: String,
        /// The weight.
        weight: String,
        /// What the application said.
        reason: String,
    },

    /// The caller asked to stop waiting.
    #[error("interrupted while waiting for weights on {device}")]
    Interrupted {
        /// The device.
        device: DeviceId,
    },

    /// The model was detached, or the VBAR closed.
    #[error("{name:?} was detached from {device}; attach it again to use its weights")]
    Detached {
        /// The model's or VBAR's name.
        name: String,
        /// The device.
        device: DeviceId,
    },

    /// An argument is out of its range.
    #[error("{0}")]
    Invalid(String),

    /// A thread of the engine ended unexpectedly. The engine takes no more calls.
    #[error("the engine of {device} stopped: {reason}")]
    Stopped {
        /// The device.
        device: DeviceId,
        /// What ended it.
        reason: String,
    },
}

impl EngineError {
    /// Whether the error says that memory ran out.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            EngineError::TooLarge { .. } | EngineError::AllPinned { .. } => true,
            EngineError::Device(error) => error.is_out_of_memory(),
            _ => false,
        }
    }
}
