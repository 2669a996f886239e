//! The `lockgate` binary: flags in, a command run, an exit status out.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use lockgate_controller::args::{Cli, Command};
use lockgate_controller::{check, demo, explain, ingress, node};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::read();
    log_to_stderr(&cli.command);
    // Traffic has threads of its own; this one reads, translates and publishes.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error.into()),
    };
    let done = match &cli.command {
        Command::Check(args) => return check::run(args).into(),
        Command::Explain(args) => return runtime.block_on(explain::run(args)).into(),
        Command::Ingress(args) => runtime.block_on(ingress::run(args)),
        Command::Demo(args) => runtime.block_on(demo::run(args)),
        Command::Node(args) => runtime.block_on(node::run(args)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("lockgate: {error:#}");
    ExitCode::FAILURE
}

/// `RUST_LOG` says what; by default all that an operator should see.
fn log_to_stderr(command: &Command) {
    let default = match command {
        Command::Ingress(_) | Command::Node(_) => "info",
        // These print their own account of things.
        Command::Demo(_) => "warn",
        Command::Check(_) | Command::Explain(_) => "off",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(colours)
        .init();
}
