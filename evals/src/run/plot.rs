//! Curves of a run by length, one a subject, as SVG and PNG.
//! Knows no sample; the font lies in the source, so that a plot needs none of the system.

use super::summary::{Cost, Group, Mean, Summary};
use crate::job::Result;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Also the family that an SVG names, which every viewer has.
const FONT: &str = "sans-serif";
const FONT_BYTES: &[u8] = include_bytes!("../../data/dejavu/DejaVuSans-ascii.ttf");
const SIZE: (u32, u32) = (960, 600);
/// Room for names of about 16 letters.
const LEGEND_WIDTH: u32 = 180;
/// Okabe and Ito's colours, which are told apart without red or green vision.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// Points (tokens, value) by subject, in the order of lengths.
type Lines = BTreeMap<String, Vec<(u64, f64)>>;

struct Plot {
    file: &'static str,
    title: String,
    unit: &'static str,
    /// Top of the axis; None: a little above the highest point.
    top: Option<f64>,
    lines: Lines,
}

/// Writes the plots of `summary` into `folder`; none where the groups are no lengths.
pub(super) fn write(folder: &Path, benchmark: &str, summary: &Summary) -> Result<()> {
    // Pooled samples have no averages by length.
    let is_length = |group: &Group| group.length().is_some();
    if summary.averages.is_empty() || !summary.averages.keys().all(is_length) {
        return Ok(());
    }
    let mut scores = Lines::new();
    for (group, row) in &summary.averages {
        for (subject, mean) in row {
            if let (Some(length), Some(mean)) = (group.length(), mean.value()) {
                scores.entry(subject.clone()).or_default().push((length, mean * 100.0));
            }
        }
    }
    let plots = [
        Plot {
            file: "accuracy",
            title: format!("{benchmark}: mean score over tasks by length"),
            unit: "score x100",
            top: Some(100.0),
            lines: scores,
        },
        Plot {
            file: "decode_time",
            title: format!("{benchmark}: decode time by length"),
            unit: "ms a token",
            top: None,
            lines: cost_lines(summary, |cost| cost.decode_ms),
        },
        Plot {
            file: "peak_memory",
            title: format!("{benchmark}: peak memory by length"),
            unit: "MiB",
            top: None,
            lines: cost_lines(summary, |cost| cost.peak_mib),
        },
    ];
    register_font(FONT, FontStyle::Normal, FONT_BYTES)
        .map_err(|_| "plot: the font in the source is damaged, expected TrueType")?;
    for plot in plots.iter().filter(|plot| !plot.lines.is_empty()) {
        let write = |ending: &str, bytes: &[u8]| {
            let path = folder.join(format!("{}.{ending}", plot.file));
            std::fs::write(&path, bytes).map_err(|e| format!("{}: {e}", path.display()))
        };
        write("svg", svg(plot)?.as_bytes())?;
        write("png", &png(plot)?)?;
    }
    Ok(())
}

fn cost_lines(summary: &Summary, mean: impl Fn(&Cost) -> Mean) -> Lines {
    let mut lines = Lines::new();
    for ((subject, group), cost) in &summary.costs {
        if let (Some(length), Some(value)) = (group.length(), mean(cost).value()) {
            lines.entry(subject.clone()).or_default().push((length, value));
        }
    }
    lines
}

fn svg(plot: &Plot) -> Result<String> {
    let mut text = String::new();
    draw(&SVGBackend::with_string(&mut text, SIZE).into_drawing_area(), plot)
        .map_err(|e| format!("plot {}: {e}", plot.file))?;
    Ok(text)
}

fn png(plot: &Plot) -> Result<Vec<u8>> {
    let (width, height) = SIZE;
    let mut pixels = vec![0; (width * height * 3) as usize];
    draw(&BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area(), plot)
        .map_err(|e| format!("plot {}: {e}", plot.file))?;
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(bytes)
}

fn draw<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    plot: &Plot,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    let points = || plot.lines.values().flatten();
    let mut lengths: Vec<u64> = points().map(|(length, _)| *length).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let highest = points().map(|(_, value)| *value).fold(0.0, f64::max);
    // A point on the top line would be cut in half.
    let top = plot.top.unwrap_or(highest.max(f64::MIN_POSITIVE)) * 1.05;

    area.fill(&WHITE)?;
    let (curves, legend) = area.split_horizontally(SIZE.0 - LEGEND_WIDTH);
    let mut chart = ChartBuilder::on(&curves)
        .margin(16)
        .caption(&plot.title, (FONT, 24))
        .x_label_area_size(52)
        .y_label_area_size(76)
        .build_cartesian_2d(Lengths(lengths), 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc("tokens of the sample")
        .y_desc(plot.unit)
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 18))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (i, (subject, line)) in plot.lines.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        // A curve below another is wider, so that equal ones are both seen.
        let above = (plot.lines.len() - 1 - i) as u32;
        let style = colour.stroke_width(2 + 2 * above);
        chart.draw_series(LineSeries::new(line.iter().copied(), style))?;
        let point = |at: &(u64, f64)| Circle::new(*at, 4 + above, colour.filled());
        chart.draw_series(line.iter().map(point))?;
        let y = 72 + 28 * i as i32;
        legend.draw(&PathElement::new([(0, y), (24, y)], colour.stroke_width(4)))?;
        legend.draw(&Text::new(subject.as_str(), (32, y - 8), (FONT, 16)))?;
    }
    area.present()
}

/// The axis of these lengths, in order: on their logarithms, for each is about the double of the one before.
struct Lengths(Vec<u64>);

impl Ranged for Lengths {
    type FormatOption = NoDefaultFormatting;
    type ValueType = u64;

    fn map(&self, length: &u64, (low, high): (i32, i32)) -> i32 {
        let place = |length: u64| (length.max(1) as f64).log2();
        let range = self.range();
        // A third of a doubling stays free at both ends, so that no point lies on the frame.
        let (first, last) = (place(range.start) - 1.0 / 3.0, place(range.end) + 1.0 / 3.0);
        let share = (place(*length) - first) / (last - first);
        low + (f64::from(high - low) * share).round() as i32
    }

    fn key_points<H: KeyPointHint>(&self, hint: H) -> Vec<u64> {
        // A tick at every length and none between them.
        if hint.weight().allow_light_points() { Vec::new() } else { self.0.clone() }
    }

    fn range(&self) -> Range<u64> {
        self.0.first().copied().unwrap_or(1)..self.0.last().copied().unwrap_or(1)
    }
}

impl ValueFormatter<u64> for Lengths {
    fn format(length: &u64) -> String {
        tokens(*length)
    }
}

/// A length as people say it: 4K, 128K, 1M; digits where it is no round number.
fn tokens(length: u64) -> String {
    match length {
        0 => "0".into(),
        m if m.is_multiple_of(1 << 20) => format!("{}M", m >> 20),
        k if k.is_multiple_of(1 << 10) => format!("{}K", k >> 10),
        other => other.to_string(),
    }
}
