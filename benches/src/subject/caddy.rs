//! Caddy, one core.

use std::process::Command;

use anyhow::{Result, ensure};

use super::{Front, HOST, Site};

pub(super) fn command(site: &Site) -> Result<Command> {
    ensure!(site.task.hosts == 1 && !site.task.log && !site.task.edits, "not set up for this scenario");
    let file = site.write("Caddyfile", &configuration(site)?)?;
    let mut command = site.command();
    command.args(["run", "--adapter", "caddyfile", "--config"]).arg(file);
    command.env("GOMAXPROCS", "1").env("HOME", site.folder).env("XDG_DATA_HOME", site.folder);
    command.env("XDG_CONFIG_HOME", site.folder);
    Ok(command)
}

fn configuration(site: &Site) -> Result<String> {
    ensure!(site.task.front != Front::Tcp, "Caddy relays HTTP only");
    let (port, backend) = (site.address.port(), site.backend);
    let (scheme, tls) = match site.task.front {
        Front::Https => {
            let chain = site.write("tls.crt", &site.certificate.chain)?;
            let key = site.write("tls.key", &site.certificate.key)?;
            ("https", format!("tls {} {}", chain.display(), key.display()))
        }
        _ => ("http", String::new()),
    };
    let pool = format!(
        "reverse_proxy {backend} {{
            header_up X-Real-IP {{remote_host}}
            header_up X-Forwarded-Port {port}
            header_up X-Request-ID {{http.request.uuid}}
            transport http {{
                dial_timeout 5s
                response_header_timeout 60s
                keepalive 75s
                keepalive_idle_conns_per_host 1024
            }}
        }}"
    );
    Ok(format!(
        "{{
    admin off
    persist_config off
    auto_https off
    servers {{
        timeouts {{
            read_header 60s
            idle 75s
        }}
    }}
}}
{scheme}://{HOST}:{port} {{
    bind 127.0.0.1
    {tls}
    handle /api* {{
        {pool}
    }}
    handle /static* {{
        {pool}
    }}
    handle {{
        {pool}
    }}
}}
"
    ))
}
