//! Pages as a line of blocks.

use forebay::PageState;

/// Blocks in a line.
const WIDTH: usize = 64;

/// How the line is to be read.
pub(crate) const LEGEND: &str =
    "█ resident   ░ streamed   · looked up at the source   ▓ ▒ more or less than half resident";

/// One block a page, or a block for several where there are more pages than fit.
pub(crate) fn picture(pages: &[PageState]) -> String {
    let columns = pages.len().min(WIDTH);
    let column = |i: usize| &pages[i * pages.len() / columns..(i + 1) * pages.len() / columns];
    (0..columns).map(|i| block(column(i))).collect()
}

fn block(pages: &[PageState]) -> char {
    let resident = pages.iter().filter(|page| **page == PageState::Resident).count();
    match 2 * resident {
        0 if pages.iter().all(|page| *page == PageState::Absent) => '·',
        0 => '░',
        _ if resident == pages.len() => '█',
        twice if twice >= pages.len() => '▓',
        _ => '▒',
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use PageState::{Absent, Resident, Streamed};

    #[test]
    fn few_pages_have_a_block_each_and_many_share() {
        assert_eq!(picture(&[]), "");
        assert_eq!(picture(&[Resident, Streamed, Streamed, Resident, Absent]), "█░░█·");
        let pages: Vec<_> = [[Resident; 3], [Streamed, Streamed, Resident], [Resident, Resident, Streamed]]
            .iter()
            .cycle()
            .take(64)
            .flatten()
            .copied()
            .collect();
        assert_eq!(picture(&pages), "█▒▓".repeat(22).chars().take(64).collect::<String>());
        assert_eq!(picture(&[Streamed; 1000]), "░".repeat(64));
    }
}
