//! Timings as JSON lines, without Python. All times are CPU time of the thread.

mod align;
mod hostile;
mod input;
mod output;
mod project;
mod resync;
mod timing;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(version, about = "Times the core of xtoken and prints JSON lines.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The walk on equal bytes, beside the floor loop and a quadratic reference.
    Align(align::Arguments),
    /// W on one thread, its parts beside it.
    Project(project::Arguments),
    /// Texts that differ: cost over the clean walk, and bytes in exact chunks against the optimum.
    Resync(resync::Arguments),
}

fn main() {
    let result = match Arguments::parse().command {
        Command::Align(arguments) => align::run(&arguments),
        Command::Project(arguments) => project::run(&arguments),
        Command::Resync(arguments) => resync::run(&arguments),
    };
    if let Err(error) = result {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
