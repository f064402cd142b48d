//! What the tasks of a daemon share that is no channel: each a small type without a task, a
//! socket or a clock, so that loom can run every interleaving of those who use it
//! (`tests/run cores`). Everything else that two tasks know goes by a channel, or is the library's
//! own (`tests/REQUIREMENTS.md` lists it).

mod gate;
mod places;
mod reading;
mod remembered;
mod sync;

pub use gate::Gate;
pub use places::{Place, Places};
pub use reading::{ReadBytes, Reading};
pub use remembered::Remembered;
