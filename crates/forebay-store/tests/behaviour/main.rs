//! What a user of the crate sees: real files, random bytes, and things going wrong.

mod checkpoints;
mod data;
mod files;
mod malformed;
mod provenance;
mod readers;
mod sources;
