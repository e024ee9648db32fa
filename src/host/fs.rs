//! Files, durably: temp file, fsync, rename, fsync of the folder.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, fchown, symlink};
use std::path::Path;

use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt};

use super::{exec, paths};
use crate::error::{At, Code, OrCode, Result};

/// Name of a file whose bytes are not all there yet.
pub const UNFINISHED: &str = ".zd-unfinished";

/// Who owns a file: a user of this host (its group has the same name), or root.
pub fn ids(owner: Option<&str>) -> Result<(u32, u32)> {
    let Some(owner) = owner else { return Ok((0, 0)) };
    // Our users are local; a static binary has no NSS.
    let passwd = fs::read_to_string("/etc/passwd").at("/etc/passwd")?;
    let fields = passwd.lines().map(|l| l.split(':').collect::<Vec<_>>()).find(|f| f.first() == Some(&owner));
    let id = |i: usize| fields.as_ref().and_then(|f| f.get(i)?.parse().ok());
    match (id(2), id(3)) {
        (Some(uid), Some(gid)) => Ok((uid, gid)),
        _ => Err(Code::Io.err(format!("/etc/passwd has no user {owner}"))),
    }
}

/// Name of the user with this number; None is root.
pub fn user(uid: u32) -> Result<Option<String>> {
    if uid == 0 {
        return Ok(None);
    }
    let passwd = fs::read_to_string("/etc/passwd").at("/etc/passwd")?;
    let fields = passwd.lines().map(|l| l.split(':').collect::<Vec<_>>());
    let mut named = fields.filter(|f| f.get(2).and_then(|id| id.parse().ok()) == Some(uid));
    let unknown = || Code::Io.err(format!("/etc/passwd has no user with number {uid}"));
    named.next().and_then(|f| f.first().map(|name| Some((*name).to_owned()))).ok_or_else(unknown)
}

pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).at(dir)
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Writes a whole file so that after a crash there is the old one or the new one.
pub fn write(path: &Path, bytes: &[u8], mode: u32, owner: Option<&str>) -> Result<()> {
    write_owned(path, bytes, mode, ids(owner)?)
}

pub fn write_owned(path: &Path, bytes: &[u8], mode: u32, (uid, gid): (u32, u32)) -> Result<()> {
    let mut temp = temp_beside(path)?;
    temp.write_all(bytes).at(path)?;
    keep(temp, path, mode, (uid, gid))
}

/// As [`write`], for a name that came from outside: it is looked up beneath the handle of a folder of zd's own and
/// can lead nowhere else, whatever links lie there.
pub fn write_beneath(path: &Path, bytes: &[u8], mode: u32, owner: Option<&str>) -> Result<()> {
    let (uid, gid) = ids(owner)?;
    let own = [paths::ETC, paths::VAR, paths::LOG].into_iter().find(|own| path.starts_with(own));
    let own = own.ok_or_else(|| Code::Bug.err(format!("{} is no place of zd's", path.display())))?;
    let dir = Dir::open_ambient_dir(own, cap_std::ambient_authority()).at(own)?;
    let beneath = path.strip_prefix(own).unwrap_or(path);
    let folder = beneath.parent().filter(|p| *p != Path::new(""));
    let dir = dir.open_dir(folder.unwrap_or(Path::new("."))).at(path)?;
    let name = beneath.file_name().unwrap_or_default();
    let _ = dir.remove_file(UNFINISHED);
    let mut options = OpenOptions::new();
    let mut file = dir.open_with(UNFINISHED, options.write(true).create_new(true).mode(0o600)).at(path)?;
    file.write_all(bytes).at(path)?;
    let file = file.into_std();
    fchown(&file, Some(uid), Some(gid)).at(path)?;
    file.set_permissions(Permissions::from_mode(mode)).at(path)?;
    file.sync_all().at(path)?;
    dir.rename(UNFINISHED, &dir, name).at(path)?;
    sync_dir(parent(path))
}

/// A temporary file in the folder of `path`, mode 0600 until it is kept.
pub fn temp_beside(path: &Path) -> Result<tempfile::NamedTempFile> {
    tempfile::Builder::new().prefix(".zd-").tempfile_in(parent(path)).at(path)
}

/// Gives a temporary file its owner, mode and name.
pub fn keep(temp: tempfile::NamedTempFile, path: &Path, mode: u32, (uid, gid): (u32, u32)) -> Result<()> {
    chown(temp.path(), Some(uid), Some(gid)).at(path)?;
    temp.as_file().set_permissions(Permissions::from_mode(mode)).at(path)?;
    temp.as_file().sync_all().at(path)?;
    temp.persist(path).map_err(|e| crate::error::io(path, e.error))?;
    sync_dir(parent(path))
}

/// Makes a symlink point elsewhere in one rename.
pub fn set_link(path: &Path, target: &Path) -> Result<()> {
    swap_link(path, target)?;
    sync_dir(parent(path))
}

/// As [`set_link`], but not yet on disk: for the moments in which clients wait.
pub fn swap_link(path: &Path, target: &Path) -> Result<()> {
    let temp = path.with_extension("zd-new");
    let _ = fs::remove_file(&temp);
    symlink(target, &temp).at(&temp)?;
    fs::rename(&temp, path).at(path)
}

/// The file's bytes, if there is one.
pub fn read_if_any(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(crate::error::io(path, e)),
    }
}

/// Mode and owner are as wanted.
pub fn looks_like(path: &Path, mode: u32, (uid, gid): (u32, u32)) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.mode() & 0o7777 == mode && m.uid() == uid && m.gid() == gid)
}

/// Makes a folder; one that is there gets mode and owner.
pub fn make_dir(path: &Path, mode: u32, owner: Option<&str>) -> Result<()> {
    if !path.is_dir() {
        fs::create_dir(path).at(path)?;
    }
    let (uid, gid) = ids(owner)?;
    chown(path, Some(uid), Some(gid)).at(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode)).at(path)?;
    sync_dir(parent(path))
}

/// Removes a file or symlink; gone is good.
pub fn remove_file(path: &Path) -> Result<()> {
    gone_is_good(fs::remove_file(path), path)
}

/// Removes a folder and all below it, or a file; gone is good. Symlinks are removed, not followed.
pub fn remove_tree(path: &Path) -> Result<()> {
    let is_dir = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    if is_dir { gone_is_good(fs::remove_dir_all(path), path) } else { remove_file(path) }
}

/// Copies a folder with owners, modes and times, so that `to` is whole or not there.
pub async fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let partial = to.with_extension("zd-partial");
    remove_tree(&partial)?;
    let (source, target) = (from.to_string_lossy(), partial.to_string_lossy());
    exec::run(&["cp", "-a", "--reflink=auto", "--", source.as_ref(), target.as_ref()]).await?;
    exec::run(&["sync", "-f", target.as_ref()]).await?;
    fs::rename(&partial, to).at(to)?;
    sync_dir(parent(to))
}

/// Detaches everything mounted beneath a path (umount(8), `--lazy`). Mounts of the same file systems in other
/// namespaces stay.
pub async fn unmount_beneath(path: &Path) -> Result<()> {
    let mounts = procfs::process::Process::myself().and_then(|own| own.mountinfo());
    let mounts = mounts.or_code(Code::Io, "/proc/self/mountinfo")?;
    for mount in mounts.into_iter().rev().filter(|mount| mount.mount_point.starts_with(path)) {
        exec::run(&[OsStr::new("umount"), OsStr::new("--lazy"), mount.mount_point.as_os_str()]).await?;
    }
    Ok(())
}

/// Removes a folder if it is empty; a folder with something in it stays.
pub fn remove_empty(path: &Path) -> Result<()> {
    match fs::remove_dir(path) {
        Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => Ok(()),
        other => gone_is_good(other, path),
    }
}

/// Removes all below a folder but not the folder itself.
pub fn empty_dir(path: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(path) else { return Ok(()) };
    for entry in entries {
        let entry = entry.at(path)?;
        if entry.file_type().at(path)?.is_dir() {
            remove_tree(&entry.path())?
        } else {
            remove_file(&entry.path())?
        }
    }
    Ok(())
}

fn gone_is_good(result: std::io::Result<()>, path: &Path) -> Result<()> {
    match result {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.at(path),
    }
}
