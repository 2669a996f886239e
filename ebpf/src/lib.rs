//! User-space half of the service plane: the desired [`ServiceTable`]. What
//! makes it live in the kernel is not written yet.
#![forbid(unsafe_code)]

pub mod table;

pub use table::ServiceTable;
