//! Curves as SVG: a title, two axes, one line a name.
//! Knows no run; the font lies in the source, so that a plot needs none of the system.

use crate::job::Result;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use std::path::Path;

const FONT: &str = "sans-serif";
const FONT_BYTES: &[u8] = include_bytes!("../data/dejavu/DejaVuSans-ascii.ttf");
const SIZE: (u32, u32) = (960, 540);
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

/// One curve; a line without points is not drawn.
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Writes `lines` as an SVG file; nothing where no line has a point.
pub(crate) fn write(path: &Path, title: &str, axes: (&str, &str), lines: &[Line]) -> Result<()> {
    if lines.iter().all(|line| line.points.is_empty()) {
        return Ok(());
    }
    register_font(FONT, FontStyle::Normal, FONT_BYTES)
        .map_err(|_| "plot: the font in the source is damaged, expected TrueType")?;
    let mut text = String::new();
    draw(&mut text, title, axes, lines).map_err(|e| format!("plot {}: {e}", path.display()))?;
    std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()).into())
}

fn draw(text: &mut String, title: &str, (x, y): (&str, &str), lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let bounds = |value: fn(&(f64, f64)) -> f64| {
        let low = points().map(value).fold(f64::INFINITY, f64::min);
        let high = points().map(value).fold(f64::NEG_INFINITY, f64::max);
        // A line of one value still needs a height.
        let room = ((high - low) * 0.05).max(high.abs() * 1e-3).max(1e-6);
        low - room..high + room
    };
    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    let failed = |e: &dyn std::fmt::Display| e.to_string();
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .caption(title, (FONT, 24))
        .x_label_area_size(52)
        .y_label_area_size(76)
        .build_cartesian_2d(bounds(|point| point.0), bounds(|point| point.1))
        .map_err(|e| failed(&e))?;
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc(y)
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 18))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(|e| failed(&e))?;
    for (i, line) in lines.iter().enumerate().filter(|(_, line)| !line.points.is_empty()) {
        let style = COLOURS[i % COLOURS.len()].stroke_width(2);
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), style))
            .map_err(|e| failed(&e))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 16))
        .draw()
        .map_err(|e| failed(&e))?;
    area.present().map_err(|e| failed(&e))?;
    Ok(())
}
