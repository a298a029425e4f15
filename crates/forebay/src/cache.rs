//! The page cache of weights' files: how much of the host's memory it may have ([`ram`]), what of it the copy engine reads
//! by itself ([`registered`], [`registering`], [`parts`]), what is read past it where it is too small ([`share`]), and the thread that
//! sees to all that ([`keeper`]).

pub(crate) mod keeper;
pub(crate) mod parts;
pub(crate) mod ram;
pub(crate) mod registered;
pub(crate) mod registering;
pub(crate) mod share;
