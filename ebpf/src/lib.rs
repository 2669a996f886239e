//! User-space half of the service plane: the desired [`ServiceTable`], what it
//! means ([`verdict`]), and what makes it live in kernel maps
//! ([`Reconciler`]). Layouts and the update protocol: `lockgate_ebpf_common`.
#![forbid(unsafe_code)]

mod ids;
pub mod live;
pub mod maglev;
pub mod maps;
mod reconcile;
pub mod table;
pub mod verdict;

pub use ids::QUARANTINE;
pub use live::Live;
pub use maps::Maps;
pub use reconcile::{Outcome, Reconciler};
pub use table::ServiceTable;
