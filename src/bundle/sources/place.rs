//! Where a file is: at a URL, or in a folder. A mirror (`--mirror`) is another place for everything that
//! is named by a URL; only the place changes, sums and signatures hold as before.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use reqwest::Url;

use crate::error::{Code, Result};

/// A file, or the root of a mirror.
#[derive(Clone, Debug)]
pub enum Place {
    Server(Url),
    Folder(PathBuf),
}

impl FromStr for Place {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        if !s.contains("://") {
            return Ok(Place::Folder(s.into()));
        }
        let url: Url = s.parse().map_err(|e| format!("{s:?} is not a URL: {e}"))?;
        match url.scheme() {
            "http" | "https" => Ok(Place::Server(url)),
            other => Err(format!("{other}:// is not known here: expected http://, https://, or a folder")),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Server(url) => url.fmt(f),
            Place::Folder(path) => path.display().fmt(f),
        }
    }
}

impl Place {
    /// Of what a manifest or zd names by `url`: there, or at the same path of the mirror.
    pub fn of(url: &str, mirror: Option<&Place>) -> Result<Self> {
        let own: Url = url.parse().map_err(|e| {
            Code::Manifest.err(format!("{url:?} is not a URL: {e}")).cure("write it whole: https://host/path")
        })?;
        // A parsed URL has no `..` left in its path.
        let path = own.path().trim_start_matches('/');
        Ok(match mirror {
            None => Place::Server(own),
            Some(Place::Folder(dir)) => Place::Folder(dir.join(path)),
            Some(Place::Server(base)) => {
                let mut url = base.clone();
                url.set_path(&format!("{}/{path}", base.path().trim_end_matches('/')));
                Place::Server(url)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_stays_and_the_origin_changes() {
        let place = |mirror: Option<&str>, url: &str| {
            let mirror: Option<Place> = mirror.map(|m| m.parse().unwrap());
            Place::of(url, mirror.as_ref()).unwrap().to_string()
        };
        let url = "https://files.example:444/a/b_1.zip";
        assert_eq!(place(None, url), url);
        assert_eq!(place(Some("/srv/mirror"), url), "/srv/mirror/a/b_1.zip");
        assert_eq!(place(Some("http://10.0.0.1:8000"), url), "http://10.0.0.1:8000/a/b_1.zip");
        assert_eq!(place(Some("http://m.example/hc/"), url), "http://m.example/hc/a/b_1.zip");
        for outside in ["https://h/../../etc/passwd", "https://h/%2e%2e/etc/passwd", "https://h//etc/passwd"]
        {
            assert_eq!(place(Some("/srv/mirror"), outside), "/srv/mirror/etc/passwd");
        }
        assert!("ftp://h/".parse::<Place>().unwrap_err().contains("ftp:// is not known here"));
        assert!(Place::of("files.example/x", None).is_err());
    }
}
