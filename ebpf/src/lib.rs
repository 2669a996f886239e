//! User-space half of the service plane: the desired [`ServiceTable`], and the kernel's programs and maps.
//!
//! `unsafe` is in [`sys`] (bpf(2)) and [`shared`] (mapped arrays) alone.

pub mod kernel;
pub mod load;
pub mod shared;
pub mod sys;
pub mod table;

pub use table::ServiceTable;
