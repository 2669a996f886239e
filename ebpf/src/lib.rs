//! User-space half of the service plane: the desired [`ServiceTable`], what it
//! means ([`verdict`]), and what makes it live in kernel maps.
#![forbid(unsafe_code)]

pub mod table;
pub mod verdict;

pub use table::ServiceTable;
