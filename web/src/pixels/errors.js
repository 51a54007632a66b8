/** A file that cannot be read exactly; the message is shown to the user beside the file's name. */
export class FileError extends Error {}
