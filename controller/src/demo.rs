//! `lockgate demo`
use crate::args::DemoArgs;
/// x
pub async fn run(_args: &DemoArgs) -> anyhow::Result<()> {
    Ok(())
}
