//! The comparison as a picture: bars of CPU per request, nginx being 1.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::raw::{self, Outcome, Run};
use crate::statistics::Spread;

/// Scenarios shown, in this order, and what they are called.
const SHOWN: [(&str, &str); 9] = [
    ("http1", "HTTP/1.1, 1 KB"),
    ("http1-full", "10,000 hosts, JSON log"),
    ("close", "connection per request"),
    ("tls", "HTTP/1.1 over TLS"),
    ("h2", "HTTP/2 over TLS"),
    ("handshake-full", "TLS 1.3 handshake"),
    ("handshake-resumed", "TLS 1.3 resumed"),
    ("body64k", "64 KiB bodies"),
    ("body1m", "1 MiB bodies"),
];
/// Subjects shown, with their colours: dark enough on white, light enough on black.
const COLOURS: [(&str, &str); 7] = [
    ("lockgate", "#2a8f5d"),
    ("nginx", "#8b949e"),
    ("haproxy", "#5b8def"),
    ("envoy", "#b277d8"),
    ("pingora-proxy", "#e08a3c"),
    ("hyper-proxy", "#c9a227"),
    ("caddy", "#d8627a"),
];
/// All others are a multiple of its figure.
const UNIT: &str = "nginx";
const FIGURE: &str = "cpu_us";

const WIDTH: f64 = 760.0;
const LABELS: f64 = 170.0;
const VALUES: f64 = 60.0;
const BAR: f64 = 13.0;
const GAP: f64 = 16.0;
const TOP: f64 = 64.0;
/// Longer bars are cut, with their number beside them.
const LONGEST: f64 = 3.0;

/// Draws the rounds that `json` holds.
pub(crate) fn draw(json: &Path, svg: &Path) -> Result<()> {
    let text = picture(&raw::read(json)?)?;
    std::fs::write(svg, text).with_context(|| svg.display().to_string())
}

/// One scenario: each subject's figure as a multiple of nginx's.
struct Group<'a> {
    title: &'a str,
    bars: Vec<(&'a str, &'a str, f64)>,
}

fn group<'a>(outcome: &Outcome, title: &'a str) -> Option<Group<'a>> {
    if outcome.clean().len() < outcome.wanted {
        return None;
    }
    let unit = [UNIT.to_owned()];
    let bars: Vec<_> = COLOURS
        .into_iter()
        .filter_map(|(name, colour)| {
            Some((name, colour, Spread::of(outcome.ratios(name, &unit, FIGURE))?.median))
        })
        .collect();
    (!bars.is_empty()).then_some(Group { title, bars })
}

fn picture(run: &Run) -> Result<String> {
    let groups: Vec<Group> = SHOWN
        .into_iter()
        .filter_map(|(name, title)| group(run.scenarios.iter().find(|s| s.name == name)?, title))
        .collect();
    ensure!(!groups.is_empty(), "no scenario with clean passes and {UNIT} among its subjects");
    let longest = groups.iter().flat_map(|group| &group.bars).map(|bar| bar.2).fold(1.0, f64::max);
    let scale = (WIDTH - LABELS - VALUES) / longest.min(LONGEST);
    let mut body = String::new();
    let mut y = TOP;
    for group in &groups {
        let middle = y + group.bars.len() as f64 * BAR / 2.0 + 4.0;
        writeln!(
            body,
            "<text x=\"{}\" y=\"{middle:.0}\" text-anchor=\"end\">{}</text>",
            LABELS - 10.0,
            group.title
        )?;
        for &(name, colour, ratio) in &group.bars {
            let width = ratio.min(LONGEST) * scale;
            let weight = if name == "lockgate" { " class=\"own\"" } else { "" };
            writeln!(
                body,
                "<rect x=\"{LABELS}\" y=\"{y:.0}\" width=\"{width:.1}\" height=\"{:.0}\" rx=\"2\" fill=\"{colour}\">\
                 <title>{name}: {ratio:.2}</title></rect>\n\
                 <text{weight} x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\">{ratio:.2}</text>",
                BAR - 2.0,
                LABELS + width + 5.0,
                y + BAR - 3.0,
            )?;
            y += BAR;
        }
        y += GAP;
    }
    let height = y + 16.0;
    let line = LABELS + scale;
    let mut legend = String::new();
    let mut x = LABELS;
    for (name, colour) in COLOURS {
        if groups.iter().any(|group| group.bars.iter().any(|bar| bar.0 == name)) {
            writeln!(
                legend,
                "<rect x=\"{x:.0}\" y=\"34\" width=\"10\" height=\"10\" rx=\"2\" fill=\"{colour}\"/>\
                 <text x=\"{:.0}\" y=\"43\" font-size=\"12\">{name}</text>",
                x + 14.0
            )?;
            x += 32.0 + name.len() as f64 * 6.6;
        }
    }
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" \
         height=\"{height:.0}\" role=\"img\" aria-label=\"CPU per request, nginx being 1\">
<style>
text {{ font: 13px system-ui, sans-serif; fill: #24292f }}
.own {{ font-weight: bold }}
.unit {{ stroke: #8b949e; stroke-dasharray: 3 3 }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} }}
</style>
<text x=\"{LABELS}\" y=\"20\" class=\"own\">CPU per request, {UNIT} = 1: shorter is better</text>
{legend}<line class=\"unit\" x1=\"{line:.1}\" x2=\"{line:.1}\" y1=\"{:.0}\" y2=\"{:.0}\"/>
{body}<text x=\"{LABELS}\" y=\"{:.0}\" font-size=\"10\" opacity=\"0.7\">{}</text>
</svg>
",
        TOP - 8.0,
        y - GAP + 4.0,
        height - 6.0,
        run.machine.replace('&', "&amp;").replace('<', "&lt;"),
    ))
}

#[cfg(test)]
mod tests {
    use crate::raw::Round;

    use super::*;

    #[test]
    fn bars_are_multiples_of_nginx() {
        let round = |subject: &str, us: f64| {
            let round = Round { subject: subject.to_owned(), clean: true, ..Round::default() };
            round.with(FIGURE, us)
        };
        let outcome = Outcome {
            name: "http1".to_owned(),
            wanted: 1,
            passes: vec![vec![round("lockgate", 6.0), round("nginx", 10.0), round("envoy", 900.0)]],
            ..Outcome::default()
        };
        let mut run = Run { machine: "Linux <x>".to_owned(), seed: 1, scenarios: vec![outcome] };
        let text = picture(&run).unwrap();
        assert!(text.contains(">0.60</text>") && text.contains(">1.00</text>"), "{text}");
        assert!(text.contains(">90.00</text>"), "a bar that is cut keeps its number: {text}");
        assert!(text.contains("Linux &lt;x>"));
        run.scenarios[0].wanted = 2;
        assert!(picture(&run).is_err(), "too few clean passes are not drawn");
    }
}
