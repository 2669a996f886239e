//! A gateway on pingora-proxy: `pingora-proxy LISTEN BACKEND`, one thread.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::Result;
use pingora_core::server::Server;
use pingora_core::server::configuration::ServerConf;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_http::RequestHeader;
use pingora_proxy::{ProxyHttp, Session, http_proxy_service};

mod routes;

use routes::Routes;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct Gateway {
    routes: Routes,
    port: String,
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, session: &mut Session, _: &mut ()) -> Result<Box<HttpPeer>> {
        let head = session.req_header();
        let host = head.headers.get("host").and_then(|host| host.to_str().ok()).unwrap_or_default();
        let Some(backend) = self.routes.find(host, head.uri.path()) else {
            return Err(pingora_core::Error::explain(pingora_core::HTTPStatus(404), "no route"));
        };
        let mut peer = HttpPeer::new(backend, false, String::new());
        peer.options.connection_timeout = Some(Duration::from_secs(5));
        peer.options.read_timeout = Some(Duration::from_secs(60));
        peer.options.write_timeout = Some(Duration::from_secs(60));
        peer.options.idle_timeout = Some(Duration::from_secs(60));
        Ok(Box::new(peer))
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        _: &mut (),
    ) -> Result<()> {
        let client = session.client_addr().and_then(|address| address.as_inet());
        let client = client.map(|address| address.ip().to_string()).unwrap_or_default();
        let host = request.headers.get("host").cloned();
        request.insert_header("X-Real-IP", &client)?;
        request.insert_header("X-Forwarded-For", &client)?;
        if let Some(host) = host {
            request.insert_header("X-Forwarded-Host", host)?;
        }
        request.insert_header("X-Forwarded-Port", &self.port)?;
        request.insert_header("X-Forwarded-Proto", "http")?;
        request.insert_header("X-Request-ID", routes::request_id())?;
        Ok(())
    }
}

fn main() {
    let mut addresses = std::env::args().skip(1);
    let mut next = || addresses.next().and_then(|a| a.parse::<SocketAddr>().ok());
    let (Some(listen), Some(backend)) = (next(), next()) else {
        eprintln!("usage: pingora-proxy LISTEN BACKEND");
        std::process::exit(2);
    };
    let settings =
        ServerConf { threads: 1, upstream_keepalive_pool_size: 1024, ..ServerConf::default() };
    let mut server = Server::new_with_opt_and_conf(None, settings);
    server.bootstrap();
    let gateway = Gateway { routes: Routes::new(backend), port: listen.port().to_string() };
    let mut service = http_proxy_service(&Arc::clone(&server.configuration), gateway);
    service.add_tcp(&listen.to_string());
    server.add_service(service);
    server.run_forever();
}
