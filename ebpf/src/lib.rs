//! User-space half of the service plane: the desired [`ServiceTable`], what it
//! means ([`verdict`]), what makes it live in maps ([`Reconciler`]), and the
//! kernel's programs and maps ([`load`], [`kernel`]). Layouts and the update
//! protocol: `lockgate_ebpf_common`.
//!
//! `unsafe` is in [`sys`] (bpf(2)) and [`shared`] (mapped arrays) alone.

mod ids;
pub mod kernel;
pub mod live;
pub mod load;
pub mod maglev;
pub mod maps;
mod reconcile;
pub mod shared;
pub mod sys;
pub mod table;
pub mod verdict;

pub use ids::QUARANTINE;
pub use live::Live;
pub use maps::Maps;
pub use reconcile::{Outcome, Reconciler};
pub use table::ServiceTable;
