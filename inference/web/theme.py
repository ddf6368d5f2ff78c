"""The look of the app: Gradio's variables in our colours and fonts that every system has; the rest is `assets/app.css`."""

from pathlib import Path

from gradio.themes.base import Base

ASSETS = Path(__file__).parent / "assets"

SANS = ("ui-sans-serif", "system-ui", "Segoe UI", "Helvetica Neue", "Liberation Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "DejaVu Sans Mono", "monospace")

# Gradio's variable -> (light, dark)
COLOURS = {
    "body_background_fill": ("#f5f2ec", "#151310"),
    "body_text_color": ("#231f1b", "#eee7dc"),
    "body_text_color_subdued": ("#6f665d", "#a89d90"),
    "background_fill_primary": ("#fffdf9", "#1d1a16"),
    "background_fill_secondary": ("#f5f2ec", "#151310"),
    "border_color_primary": ("#e0d9ce", "#3a332b"),
    "border_color_accent": ("#b4460f", "#ff8f52"),
    "color_accent_soft": ("#fae8dc", "#3a2315"),
    "block_background_fill": ("#fffdf9", "#1d1a16"),
    "block_border_color": ("#e0d9ce", "#3a332b"),
    "block_label_text_color": ("#6f665d", "#a89d90"),
    "block_title_text_color": ("#6f665d", "#a89d90"),
    "block_info_text_color": ("#6f665d", "#a89d90"),
    "input_background_fill": ("#fffdf9", "#221e19"),
    "input_border_color": ("#cfc6b8", "#4a4138"),
    "input_border_color_focus": ("#b4460f", "#ff8f52"),
    "input_placeholder_color": ("#7d736a", "#8f8578"),
    "button_primary_background_fill": ("#b4460f", "#ff8f52"),
    "button_primary_background_fill_hover": ("#943608", "#ffa673"),
    "button_primary_text_color": ("#ffffff", "#1a0f06"),
    "button_primary_border_color": ("#b4460f", "#ff8f52"),
    "button_secondary_background_fill": ("#fffdf9", "#1d1a16"),
    "button_secondary_background_fill_hover": ("#f1ebe1", "#2a251f"),
    "button_secondary_text_color": ("#231f1b", "#eee7dc"),
    "button_secondary_border_color": ("#cfc6b8", "#4a4138"),
    "slider_color": ("#b4460f", "#ff8f52"),
    "checkbox_background_color_selected": ("#b4460f", "#ff8f52"),
    "checkbox_border_color_selected": ("#b4460f", "#ff8f52"),
    "checkbox_label_background_fill_selected": ("#231f1b", "#eee7dc"),
    "checkbox_label_text_color_selected": ("#fffdf9", "#151310"),
    "loader_color": ("#b4460f", "#ff8f52"),
    "link_text_color": ("#943608", "#ffa673"),
}
SHAPES = {
    "color_accent": "#b4460f",  # has no variable for dark: app.css sets that one
    "block_border_width": "0px",
    "block_shadow": "none",
    "block_radius": "6px",
    "block_padding": "0px",
    "input_border_width": "1px",
    "input_radius": "6px",
    "input_shadow": "none",
    "input_shadow_focus": "0 0 0 3px var(--color-accent-soft)",
    "button_large_text_size": "0.95rem",
    "button_large_text_weight": "500",
    "button_large_padding": "8px 18px",
    "button_large_radius": "6px",
    "button_small_radius": "6px",
    "button_transition": "background-color 0.12s",
    "block_title_text_size": "0.8rem",
    "block_title_text_weight": "500",
    "layout_gap": "14px",
    "form_gap_width": "0px",
    "panel_border_width": "0px",
}


def theme() -> Base:
    """Our theme. It names no font of the web, so that the page asks nothing of any other host."""
    both = {name: light for name, (light, _) in COLOURS.items()} | {f"{name}_dark": dark for name, (_, dark) in COLOURS.items()}
    return Base(primary_hue="orange", neutral_hue="stone", font=SANS, font_mono=MONO, radius_size="sm").set(**both, **SHAPES)


def stylesheet() -> str:
    """The text of `assets/app.css`."""
    return (ASSETS / "app.css").read_text(encoding="utf-8")
