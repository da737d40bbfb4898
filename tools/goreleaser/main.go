// Goreleaser reads .goreleaser.yaml as GoReleaser does, which refuses a key that it does not know, and makes the packages that its
// section nfpms describes out of binaries that are built already. The rest of a release, GoReleaser itself does.
//
//	go -C tools/goreleaser run . ../../.goreleaser.yaml             check the file
//	go -C tools/goreleaser run . ../../.goreleaser.yaml BIN OUT     and make a .deb and an .rpm of the binaries in BIN
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/goreleaser/goreleaser/v2/pkg/config"
	"github.com/goreleaser/nfpm/v2"
	_ "github.com/goreleaser/nfpm/v2/deb" // the formats
	"github.com/goreleaser/nfpm/v2/files"
	_ "github.com/goreleaser/nfpm/v2/rpm"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 && len(args) != 3 {
		return errors.New("which file, or which file, folder of binaries and folder of packages?")
	}
	project, err := config.Load(args[0])
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	fmt.Printf("%s is valid: %d builds, %d packages\n", args[0], len(project.Builds), len(project.NFPMs))
	if len(args) == 1 {
		return nil
	}
	// Paths in the file are those of the repository.
	bin, out, root := args[1], args[2], filepath.Dir(args[0])
	for i := range project.NFPMs {
		for _, format := range project.NFPMs[i].Formats {
			if err := pack(&project, &project.NFPMs[i], format, bin, out, root); err != nil {
				return fmt.Errorf("%s: %w", format, err)
			}
		}
	}
	return nil
}

// pack makes one package, as the pipe of GoReleaser does with its own binaries.
func pack(project *config.Project, n *config.NFPM, format, bin, out, root string) error {
	var contents files.Contents
	for _, build := range project.Builds {
		contents = append(contents, &files.Content{
			Source:      filepath.Join(bin, build.Binary),
			Destination: filepath.Join(n.Bindir, build.Binary),
			FileInfo:    &files.ContentFileInfo{Mode: 0o755},
		})
	}
	for _, content := range n.Contents {
		contents = append(contents, &files.Content{Source: filepath.Join(root, content.Source), Destination: content.Destination, Type: content.Type})
	}
	scripts := nfpm.Scripts{}
	for to, from := range map[*string]string{
		&scripts.PostInstall: n.Scripts.PostInstall, &scripts.PreRemove: n.Scripts.PreRemove, &scripts.PostRemove: n.Scripts.PostRemove,
	} {
		if from != "" {
			*to = filepath.Join(root, from)
		}
	}
	info := nfpm.WithDefaults(&nfpm.Info{
		Name: n.PackageName, Arch: runtime.GOARCH, Platform: "linux", Version: "v0.0.0", Maintainer: n.Maintainer, Description: n.Description,
		Vendor: n.Vendor, Homepage: n.Homepage, License: n.License, Section: n.Section,
		Overridables: nfpm.Overridables{Depends: n.Dependencies, Recommends: n.Recommends, Contents: contents, Scripts: scripts},
	})
	if err := nfpm.PrepareForPackager(info, format); err != nil {
		return err
	}
	packager, err := nfpm.Get(format)
	if err != nil {
		return err
	}
	path := filepath.Join(out, packager.ConventionalFileName(info))
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	if err = packager.Package(info, file); err == nil {
		fmt.Println(path)
	}
	return errors.Join(err, file.Close())
}
