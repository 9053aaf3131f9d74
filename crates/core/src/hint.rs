//! Whose fault an error is, and what to do next.
//!
//! Advice is data beside the error, so that a terminal, a JSON answer and a log
//! line can each show it their own way.

/// Who can mend an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The bytes or settings handed in.
    Input,
    /// The machine: disk, memory, network, missing tool.
    Environment,
    /// Ashlar itself; please report it.
    Bug,
}

/// An error that knows whose fault it is and what to try next.
pub trait Hint: std::error::Error {
    /// Who can mend it.
    fn fault(&self) -> Fault;

    /// The next step in one sentence, where there is one.
    fn hint(&self) -> Option<String> {
        None
    }
}
