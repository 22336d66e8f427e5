//! One JSON object a line on standard output.

use std::io::Write;

use serde_json::Value;

/// Prints one measurement; a reader that has gone is an error, not a panic.
pub fn emit(measured: &Value) -> std::io::Result<()> {
    writeln!(std::io::stdout().lock(), "{measured}")
}
